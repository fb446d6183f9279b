"""Base model, library and router as one routed model, which is still a PreTrainedModel."""
