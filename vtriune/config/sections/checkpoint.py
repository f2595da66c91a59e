"""`checkpoint`: when the run's state is saved, and how much of it stays."""

from vtriune.config.sections.section import Count, CountOrZero, Section


class Checkpoint(Section, frozen=True):
    """Checkpoints of model, optimiser and open groups; a run resumes from the newest complete one."""

    every: CountOrZero = 10
    """Versions between checkpoints, and so the most that a run loses that ends without warning; each is written while training goes on,
    which stands still only while its state is copied to host memory. 0: only at the end, on a stop (Ctrl-C, SIGTERM, SIGHUP) and on
    `vtriune.control … checkpoint`."""
    keep: Count = 2
    """Number of checkpoints that stay; older ones are removed once a newer one is complete. Of two, one may turn out damaged."""
