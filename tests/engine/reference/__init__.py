"""One optimizer step of Align-KD in float64, written from the paper and sharing no code with the product.

An independent second opinion: nothing here imports ``alignkd``. It reads what a user gives a run (records,
images, the published weight files, the initial adapters), and has its own templates and image processing
(``samples``), vision tower, projector and language model (``models``), and losses (``step``): plain functions
of the published tensors. Attention is eager; samples are computed one by one, and neither padded nor packed.
Gradients are left to autograd.
"""
