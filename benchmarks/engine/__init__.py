"""Parts of ``vllm_engine.py``: a model, what each engine does, running one, comparing and reporting."""
