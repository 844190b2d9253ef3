"""`python -m dengine doctor`: would a training started like this work? Alone, under torchrun, under srun.

Every rank measures (`..._facts`), puts what it found on a board in the launcher's store, and one of them, the chair,
judges (`judge_...`, pure) and prints: rank 0, or the lowest that came. Nothing waits for ever, so that ranks that hang
or never come are named by the others.
"""

from dengine.tools.doctor.visit import configure, run

__all__ = ["configure", "run"]
