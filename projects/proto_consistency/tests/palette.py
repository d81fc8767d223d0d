"""The authors' colours of the prototypes; no picture here shows which one a pixel is nearest to."""

from __future__ import annotations

from splits.pictures import full_palette

# four colours of each of Pascal's 21 classes, from the authors' evaluation code; there is no rule behind them
_HEX = """
000000 000064 006400 006464  800000 800064 806400 806464  008000 008032 328000 328032  808000 808032 808064 8080c8
000080 320080 323280 326480  800080 803280 806480 809680  008080 328080 648080 c88080  808080 800080 80c880 809680
400000 403200 400064 406400  c00000 c00032 c06400 c00096  408000 408032 408064 4080c8  c08000 c08032 c08064 c08096
400080 403280 406480 409680  c00080 c03280 c06480 c09680  408080 648080 c88080 fa8080  c08080 c08000 c08032 c080c8
004000 004032 644000 004064  804000 804032 804064 8040c8  00c000 32c000 00c064 64c000  80c000 80c032 80c064 80c0c8
004080 324080 644080 c84080
"""
PROTOTYPE_COLORS = tuple(tuple(bytes.fromhex(code)) for code in _HEX.split())
# row = class * 4 + prototype, white beyond
PROTOTYPE_PALETTE = full_palette(PROTOTYPE_COLORS)
