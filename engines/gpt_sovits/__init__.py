"""GPT-SoVITS: a language model goes on speaking where the reference recording stops."""
