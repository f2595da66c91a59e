"""Eight visual tasks composed from scikit-learn's handwritten digits, and the micro model that is trained on them."""
