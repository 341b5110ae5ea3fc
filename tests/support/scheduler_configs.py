"""Scheduler configurations drawn at random: what folders on hubs have in scheduler_config.json, left out keys included."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

CLASSES = {
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
}

_BETAS = st.sampled_from([(0.00085, 0.012, "scaled_linear"), (0.0001, 0.02, "linear"), (0.0001, 0.02, "squaredcos_cap_v2")])
_COMMON: dict[str, list[Any]] = {
    "num_train_timesteps": [1000, 400],
    "prediction_type": ["epsilon", "v_prediction"],
    "steps_offset": [0, 1, 2],
    "clip_sample": [True, False],
    "timestep_spacing": ["leading", "trailing", "linspace"],
    "set_alpha_to_one": [True, False],
    "skip_prk_steps": [True, False],
    "rescale_betas_zero_snr": [True, False],
}
_OWN: dict[str, dict[str, list[Any]]] = {
    "ddim": {"clip_sample_range": [1.0, 2.0], "thresholding": [True, False]},
    "pndm": {},
    "dpm++": {
        "solver_order": [1, 2, 3],
        "algorithm_type": ["dpmsolver++", "sde-dpmsolver++"],
        "solver_type": ["midpoint", "heun"],
        "lower_order_final": [True, False],
        "euler_at_final": [True, False],
        "use_karras_sigmas": [True, False],
        "final_sigmas_type": ["zero", "sigma_min"],
    },
    "euler": {
        "use_karras_sigmas": [True, False],
        "interpolation_type": ["linear", "log_linear"],
        "final_sigmas_type": ["zero", "sigma_min"],
        "timestep_type": ["discrete"],
    },
    "heun": {"use_karras_sigmas": [True, False], "clip_sample_range": [1.0]},
}


@st.composite
def configurations(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """The scheduler that a call asks for, and the configuration in the folder, often written for another."""
    chosen = draw(st.sampled_from(list(CLASSES)))
    written_for = draw(st.sampled_from([chosen, chosen, *CLASSES]))
    start, end, schedule = draw(_BETAS)
    config: dict[str, Any] = {
        "_class_name": CLASSES[written_for],
        "_diffusers_version": "0.6.0",
        "beta_start": start,
        "beta_end": end,
        "beta_schedule": schedule,
    }
    for key, values in (_COMMON | _OWN[chosen]).items():
        value = draw(st.sampled_from([None, *values]))
        if value is not None:
            config[key] = value
    if written_for != "pndm":  # for a folder written for another scheduler, what PNDM does without this key is our choice
        config.setdefault("skip_prk_steps", True)
    return chosen, config
