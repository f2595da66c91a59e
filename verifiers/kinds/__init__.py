"""One file per verifier, and what several of them share. Hands on nothing: the registry imports a verifier when a row names it."""
