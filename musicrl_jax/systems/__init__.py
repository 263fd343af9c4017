"""Text-to-music models behind one contract, and the player that draws clips with any of them."""
