"""`python -m dengine doctor`: checks whether a training that is started in the same way would work.

It runs alone, under torchrun or under srun. Every rank measures (`..._facts`) and publishes its results through the
launcher's store. The coordinator (rank 0, or the lowest rank that came) judges them (`judge_...`, pure) and prints.
Nothing waits for ever, so that ranks that hang or never come can be named.
"""

from dengine.tools.doctor.session import configure, run

__all__ = ["configure", "run"]
