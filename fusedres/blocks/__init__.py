"""Drop-in residual blocks."""

from fusedres.blocks.basic_block import BasicBlock
from fusedres.blocks.bottleneck import Bottleneck

__all__ = ["BasicBlock", "Bottleneck"]
