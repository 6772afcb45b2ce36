"""Gemma 2 and Gemma 3 (text): Llama's places, sliding and full attention layers, and norms on each branch's output.

What their configs fix stays as heads go: the query scale (`query_pre_attn_scalar`), the soft caps, the embedding scale.
A branch that lost all its units puts zeros into its output norm, which makes zeros of them; on the way there, that norm
partly undoes a mask that fades.
"""

from dataclasses import replace

from apt.families.llama import LLAMA

GEMMA = replace(LLAMA, model_types=("gemma2", "gemma3_text"))
