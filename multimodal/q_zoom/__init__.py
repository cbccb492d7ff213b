"""Q-Zoom: a query-aware gate and a region proposal around stock image-text-to-text models (arXiv 2604.06912)."""

from multimodal.q_zoom.adapters import BackboneAdapter, UnsupportedBackbone, register_adapter
from multimodal.q_zoom.configuration import PRESETS, QZoomConfig
from multimodal.q_zoom.model import Proposal, QZoom, ZoomInfo

__all__ = [
    "PRESETS",
    "BackboneAdapter",
    "Proposal",
    "QZoom",
    "QZoomConfig",
    "UnsupportedBackbone",
    "ZoomInfo",
    "register_adapter",
]
