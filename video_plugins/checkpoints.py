"""The names of tensors in the author's checkpoints (SRTG and MTNet) -> ours.

``timm_softpool.convert_checkpoint`` applies them, and compares every shape.
"""
from __future__ import annotations

import re

# In this order; patterns of our own names are in none of them, so that our layout comes back as it is.
_COMMON = [(r'^layer(\d)\.', r'blocks.\1.'), (r'^fc\.', 'blocks.5.proj.'), (r'\.sar\.lstm\.', '.recursion.rnn.'),
           (r'\.sr_(short|long)\.op\.', r'.recursion_\1.rnn.'), (r'\.conv_short2long\.', '.conv_lateral.')]
_PLAIN = [*_COMMON, (r'^stem\.0\.', 'blocks.0.conv.'), (r'^stem\.1\.', 'blocks.0.norm.'),
          (r'\.conv(\d)\.0\.(0\.)?weight$', r'.conv\1.weight'), (r'\.conv(\d)\.1\.', r'.norm\1.')]
_FACTORISED = [*_COMMON, (r'^stem\.0\.', 'blocks.0.conv.spatial.'), (r'^stem\.1\.', 'blocks.0.conv.norm.'),
               (r'^stem\.3\.', 'blocks.0.conv.temporal.'), (r'^stem\.4\.', 'blocks.0.norm.'),
               (r'\.conv(\d)\.0\.0\.', r'.conv\1.spatial.'), (r'\.conv(\d)\.0\.1\.', r'.conv\1.norm.'),
               (r'\.conv(\d)\.0\.3\.', r'.conv\1.temporal.'), (r'\.conv(\d)\.0\.weight$', r'.conv\1.weight'),
               (r'\.conv(\d)\.1\.', r'.norm\1.')]


def rename(name: str, factorised: bool = False) -> str:
    """Our name of the author's tensor ``name``; ``factorised``: of a (2+1)-D network."""
    for pattern, replacement in _FACTORISED if factorised else _PLAIN:
        name = re.sub(pattern, replacement, name)
    return name
