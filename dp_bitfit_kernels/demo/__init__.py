"""The demonstration behind `dp-bitfit demo`: printed digits are public, handwritten digits are private."""
