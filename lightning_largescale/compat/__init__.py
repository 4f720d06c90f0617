"""Every use of a private torch, Lightning or Python API, one function or class each, with what would replace it.

Callers use `compat.name`, whichever module defines it: every name here without a leading underscore is offered.
"""

from lightning_largescale.compat.autograd import *
from lightning_largescale.compat.dispatch import *
from lightning_largescale.compat.distributed import *
from lightning_largescale.compat.dtensor import *
from lightning_largescale.compat.fsdp import *
from lightning_largescale.compat.fsdp_gather import *
from lightning_largescale.compat.fsdp_parameters import *
from lightning_largescale.compat.generators import *
from lightning_largescale.compat.lightning import *
from lightning_largescale.compat.lightning_launchers import *
from lightning_largescale.compat.lightning_loaders import *
from lightning_largescale.compat.modules import *
from lightning_largescale.compat.python import *
from lightning_largescale.compat.tensors import *
