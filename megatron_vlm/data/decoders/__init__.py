"""From encoded pictures to the patches of a batch, on a processor or a GPU.

Every decoder gives the patches of `pictures.patches`. A picture that fails leaves its reason in its
place and does not touch the others of its batch.
"""

from megatron_vlm.data.decoders.choose import DECODERS, choose_decoder
from megatron_vlm.data.decoders.cpu import CpuDecoder
from megatron_vlm.data.decoders.job import PatchJob, PictureDecoder

__all__ = ["DECODERS", "CpuDecoder", "PatchJob", "PictureDecoder", "choose_decoder"]
