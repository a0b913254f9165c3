"""What a model is worth: held-out likelihood, tokens per pass, and the text it writes."""
