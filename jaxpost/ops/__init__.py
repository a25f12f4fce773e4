"""Array helpers with no opinions: masked statistics, RoPE, attention, chunked token log-probabilities."""
