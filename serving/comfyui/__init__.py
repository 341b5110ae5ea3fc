"""Bundles in ComfyUI: a MODEL whose UNet is a bundle's, so that samplers and all behind them stay ComfyUI's own."""
