"""Other forms of a model: merged with others, and exported for other engines; each proven before it is ready."""
