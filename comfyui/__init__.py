"""The folder that ComfyUI loads as a custom node: link or copy it into its ``custom_nodes``. See README.md."""

from serving.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
