"""The demonstration behind `dp-bitfit demo`: printed characters are public, handwritten digits private."""
