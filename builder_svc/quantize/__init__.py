"""Quantizes a model layer by layer: one layer and the activations of the calibration text are in memory at a time.

plan.py         what is asked for -> the form of each linear; all that can be wrong is found here, before work starts
text.py         calibration text -> sequences of token ids
forward.py      the decoder (`builder_svc/models/decoder.py`) computed a layer at a time
sites.py        which linears read the same input, and what stands before it that can take a scale
rounding.py     round to nearest: a matrix -> the tensors of a packed form
awq.py, smoothquant.py      scales of inputs, and clipping
run.py          all of it, written as a saved checkpoint
measure.py      perplexity
"""
