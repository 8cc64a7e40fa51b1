"""Text from any source, made into packed blocks of tokens."""

from unnorm.data.documents import STDLIB, Documents, open_documents
from unnorm.data.packing import Blocks, build_blocks

__all__ = ["STDLIB", "Blocks", "Documents", "build_blocks", "open_documents"]
