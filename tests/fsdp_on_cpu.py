"""The training script with its parameters really shared out, over gloo: `torchrun` this, flags as for the script.

Accelerate offers FSDP to accelerators only, although torch shards on CPUs as well. Here it is told that the CPUs are
GPUs, and goes its usual way from there. STOP_AFTER=N interrupts after the N-th state on disk.
"""

import os
import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from ride_timm.launch import Interrupted, exit_code

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import train_accelerate

PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

left = int(os.environ.get("STOP_AFTER", -1))
save = train_accelerate.Run.save


def save_and_stop(*args, **kwargs):
    global left
    save(*args, **kwargs)
    left -= 1
    if left == 0:
        raise Interrupted(15)


train_accelerate.Run.save = save_and_stop
sys.exit(exit_code(train_accelerate.train, None))
