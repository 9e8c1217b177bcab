"""Models: which folder a name means (`models`), running it (`sentence`), batches by tokens (`batches`)."""
