"""What `utils.py` is made of: the MODELS grammar, the places where a model may already lie, the download."""


class ModelError(Exception):
    """One model cannot be had. The message is one sentence that names the model and says what to do."""
