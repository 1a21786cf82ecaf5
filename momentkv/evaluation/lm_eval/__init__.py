"""The model ``momentkv`` of lm-evaluation-harness: its tasks, read through a `MomentCache`.

``momentkv lm-eval`` and ``python -m momentkv.evaluation.lm_eval`` are lm_eval's own command line, to which the model
has been added; nothing of lm_eval is patched. In Python, importing this package adds it:

>>> import lm_eval, momentkv.evaluation.lm_eval                                          # doctest: +SKIP
>>> lm_eval.simple_evaluate(                                                             # doctest: +SKIP
...     "momentkv", {"pretrained": "meta-llama/Llama-3.1-8B-Instruct", "budget": 512}, tasks=["longbench_qasper"])
"""

from momentkv.evaluation.lm_eval.model import MomentLM, main

__all__ = ["MomentLM", "main"]
