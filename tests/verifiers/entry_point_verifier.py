"""What another package's entry point names: importing it registers a verifier."""

from verifiers import Context, Outcome, verifier
from verifiers.registry import NoParams


@verifier("from_a_package")
def exact(response: str, gold: str, params: NoParams, context: Context) -> Outcome:
    return Outcome(float(response == gold))
