"""Known ways to lose the guarantee, each as a change of the source that some test must notice.

``old`` must occur exactly once in ``file``. ``tests`` is what pytest is given; at least one of these tests must fail.
``native`` keeps the compiled backend; by default the reference runs, so that its source can be sabotaged.
"""

from __future__ import annotations

from sabotages_capture import CAPTURED
from sabotages_coverage import COVERAGE
from sabotages_memory import MEMORY
from sabotages_noise import NOISE
from sabotages_outputs import OUTPUTS
from sabotages_phases import PHASES
from sabotages_selection import SELECTION
from sabotages_sensitivity import SENSITIVITY
from sabotages_state import STATE
from sabotages_weights import WEIGHTS_ as WEIGHTS

SABOTAGES = (*SENSITIVITY, *NOISE, *STATE, *CAPTURED, *MEMORY, *COVERAGE, *SELECTION, *PHASES, *WEIGHTS, *OUTPUTS)
