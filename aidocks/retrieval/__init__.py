"""Finding texts: embedding models and rerankers, their data, hard negatives, and what they are worth."""
