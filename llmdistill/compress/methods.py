"""Every method there is, as a pipeline's option takes them: `--methods qsvd:0.6 svd:0.6 int8`. A new one adds its class here."""

from typing import TypeAlias

from llmdistill.compress.formats import BlockFloat, LowBitFloat
from llmdistill.compress.int4 import Int4
from llmdistill.compress.int8 import Int8
from llmdistill.compress.qsvd import QSVD
from llmdistill.compress.smooth import SmoothQuant
from llmdistill.compress.svd import SVD
from llmdistill.compress.tensors import CP, Tucker

CompressionMethod: TypeAlias = SVD | QSVD | Tucker | CP | SmoothQuant | Int8 | Int4 | BlockFloat | LowBitFloat
