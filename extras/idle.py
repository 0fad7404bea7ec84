"""Options that do nothing beside others are refused, so that nobody believes that they did something."""

SIZES = "dim n_layers n_heads n_kv_heads mlp_multiple mlp_width rope_theta rope_scaling norm_eps qk_norm"
DIFFUSED = "timesteps prediction t_draw t_mean t_std patch_size patch_encoder image_attention lambda_ddpm "
DIFFUSED += "steps sampler"
CODES = "codebook commitment_weight code_temperature code_top_p post_norm z_loss"
VAE = "vae_channels vae_channel_multiples vae_n_res vae_latent_channels vae_unshuffle vae_mid_attention "
VAE += "vae_quant_convs vae_norm_groups vae_kl_weight vae_perceptual_weight vae_disc_weight vae_disc_start "
VAE += "vae_steps vae_lr vae_warmup"


def refuse_idle(config, given):
    """Raises ValueError if one of the options that were `given` on the command line does nothing.

    config: a train.Config; given: names of options.
    """
    extra, data, t_draw = config.extra, config.data, config.diffusion.t_draw
    diffused, linear = extra.images == "continuous", extra.patch_encoder == "linear"
    idle = [
        (not data.text_fraction, "text", "text_fraction is 0; give --text_fraction too"),
        (extra.data and not extra.text, "text_fraction", "--data has no text of its own; give --text too"),
        (extra.data, "grammar", "--data is given, so no scenes are drawn"),
        (not extra.data, "by_folder", "scenes lie in no folders; give --data too"),
        (config.vae, VAE, "--vae is given, so none is trained"),
        (extra.tokenizer, "merges", "--tokenizer is given, so nothing is merged"),
        (config.init_from, SIZES, "the sizes are those of --init_from"),
        (not diffused, DIFFUSED, "images are discrete, and not diffused"),
        (diffused, CODES, "images are continuous; give --images discrete"),
        (linear, "unet_channels unet_blocks unet_norm", "patches are linear; give --patch_encoder unet"),
        (t_draw == "uniform", "t_mean t_std", "t_draw is uniform; give --t_draw logit_normal"),
        (not config.fsdp, "shard", "every process keeps a copy; give --fsdp"),
    ]
    for holds, names, reason in idle:
        for name in names.split():
            if holds and name in given:
                raise ValueError(f"--{name} has no effect: {reason}")
