"""From files to prompts: schema, checks, store, loader, prompt pool, preprocessing.

Importing this package loads pyarrow, not torch or transformers; those load with the first Cursor or Preprocessor.
"""

from vtriune.data.build import build_store
from vtriune.data.schema import DataError, Sample, Turn
from vtriune.data.store import Store, StoreSet

__all__ = ["DataError", "Sample", "Store", "StoreSet", "Turn", "build_store"]
