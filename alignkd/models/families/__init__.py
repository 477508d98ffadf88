"""Families of vision-language models behind one interface (``interface``): MobileVLM, and those that
transformers implements."""
