"""Training: pairs of texts and a base model in, a Matryoshka model that says what it was trained for out."""
