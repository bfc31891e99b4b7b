"""Qwen3-VL's forward and backward pass written out for speed, over the very parameters of the model that it is given.

`FusedLoss` computes what `trainer.model.SupervisedLoss` computes, which stays the reference in tests. Nothing of
transformers or PEFT is patched: saving, generating and looking at the model see what they always see.
"""
