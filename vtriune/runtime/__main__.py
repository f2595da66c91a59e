"""`python -m vtriune.runtime`: the program launchers start. Of no use by hand: it expects its parent's socket."""

from vtriune.runtime.processes.worker import main

main()
