"""mae.py against the official code's numbers: forward, loss, gradients, positions, training."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from recorded import DTYPES, assert_close, load, options, tensor
from runs import run

import mae

FORWARD = load("mae_forward")
POSITIONS = load("mae_posembed")
SCHEDULE = load("mae_schedule")
TRAJECTORY = load("mae_trajectory")
TINY = dict(image_size=32, patch_size=8, dim=64, depth=2, heads=2)
TINY |= dict(decoder_dim=32, decoder_depth=1, decoder_heads=2)
LOSSES = pytest.mark.parametrize("norm_pix_loss", [False, True], ids=["rawpix", "normpix"])


def weights(golden, prefix):
    names = [name for name in golden.files if name.startswith(prefix)]
    return {name.removeprefix(prefix): torch.from_numpy(golden[name]).float() for name in names}


def recorded(dtype, norm_pix_loss=False):
    """The recorded network, its images and noise."""
    model = mae.MAE(**TINY, norm_pix_loss=norm_pix_loss)
    model.load_state_dict(weights(FORWARD, "sd/"))  # strictly
    return model.to(dtype), tensor(FORWARD, "images", dtype), tensor(FORWARD, "noise")


# ---- 1. Network and loss


def test_the_network_is_the_official_one():
    model, images, noise = recorded(torch.float32)
    loss, pred, mask = model(images, 0.75, noise)
    order = noise.argsort(dim=1)
    assert_close(model.encode(images, order[:, :4]), FORWARD["latent"], atol=1e-5)
    assert_close(pred, FORWARD["pred"], atol=1e-5)
    assert_close(mask, FORWARD["mask"])
    assert_close(order.argsort(dim=1), FORWARD["ids_restore"])
    assert_close(mae.patchify(images, 8), FORWARD["patches"])
    assert torch.equal(mae.unpatchify(mae.patchify(images, 8), 8), images)
    assert loss.shape == () and mask.sum(dim=1).tolist() == [12] * 3


@DTYPES
@LOSSES
def test_loss_and_gradients_are_the_official_ones(norm_pix_loss, dtype):
    model, images, noise = recorded(dtype, norm_pix_loss)
    loss, _, _ = model(images, 0.75, noise)
    loss.backward()
    kind = "normpix" if norm_pix_loss else "rawpix"
    exact = dtype == torch.float64
    assert_close(loss, FORWARD[f"loss_{kind}{'_f64' * exact}"], atol=1e-9 if exact else 2e-6)
    named = dict(model.named_parameters())
    trained = {name for name, p in named.items() if p.requires_grad}
    assert trained == set(FORWARD["grad_names"].tolist())
    norms = torch.stack([named[name].grad.norm() for name in FORWARD["grad_names"]])
    assert_close(norms, FORWARD[f"grad_norms_{kind}"], rtol=1e-6 if exact else 1e-4, atol=1e-12)
    total = FORWARD[f"grad_total_norm_{kind}{'_f64' * exact}"]
    assert_close(norms.norm(), total, rtol=1e-9 if exact else 1e-5)
    for name in ("mask_token", "cls_token"):
        assert_close(named[name].grad, FORWARD[f"grad_{kind}/{name}"], atol=1e-6)
    first = named["patch_embed.proj.weight"].grad[:4]
    assert_close(first, FORWARD[f"grad_{kind}/patch_embed.proj.weight_first4"], atol=1e-6)


@LOSSES
def test_loss_of_a_constant_patch_and_of_unequal_masks(norm_pix_loss):
    images, pred, mask = (tensor(FORWARD, f"loss_only/{x}") for x in ("images", "pred", "mask"))
    assert len(set(mask.sum(dim=1).tolist())) > 1
    patches = mae.patchify(images, 8)
    loss = mae.mae_loss(pred, patches, mask, norm_pix_loss)
    kind = "normpix" if norm_pix_loss else "rawpix"
    assert_close(loss, FORWARD[f"loss_only/expected_{kind}"], atol=2e-6)
    pred[mask == 0] += 9  # what is visible does not matter
    assert torch.equal(mae.mae_loss(pred, patches, mask, norm_pix_loss), loss)


@pytest.mark.parametrize("patches, ratio, kept", [(196, 0.75, 49), (196, 0.6, 78), (81, 0.75, 20)])
def test_kept_patches_are_rounded_down(patches, ratio, kept):
    model = mae.MAE(math.isqrt(patches) * 4, 4, 8, 1, 1, 8, 1, 1)
    side = math.isqrt(patches) * 4
    loss, pred, mask = model(torch.rand(2, 3, side, side), ratio)
    assert (mask == 0).sum(dim=1).tolist() == [kept] * 2 and not torch.equal(mask[0], mask[1])
    assert pred.shape == (2, patches, 48) and loss.isfinite()


def test_removed_patches_do_not_reach_the_prediction():
    model, images, noise = recorded(torch.float32)
    _, pred, mask = model(images, 0.75, noise)
    patches = mae.patchify(images, 8)
    patches[mask == 1] = torch.randn(int(mask.sum()), 192)
    _, other, _ = model(mae.unpatchify(patches, 8), 0.75, noise)
    assert torch.equal(pred, other)
    patches[mask == 0] += 1
    assert (model(mae.unpatchify(patches, 8), 0.75, noise)[1] - pred).abs().min() > 0


def test_positions_are_the_official_ones():
    assert_close(mae.sincos_position_embedding(64, 4), POSITIONS["pos_d64_g4_cls"], atol=1e-12)
    patches = mae.sincos_position_embedding(192, 14, cls_token=False)
    assert_close(patches, POSITIONS["pos_d192_g14"], atol=1e-6)
    rows = POSITIONS["pos_d192_g14_rows"]
    assert_close(patches[rows], POSITIONS["pos_d192_g14_rows_f64"], atol=1e-12)
    model = mae.MAE(**TINY)
    for name in ("pos_embed", "decoder_pos_embed"):
        own = model.state_dict()[name]
        assert own.dtype == torch.float32 and not model.get_parameter(name).requires_grad
        assert_close(own, FORWARD[f"sd/{name}"], atol=1e-6)


def test_initial_weights():
    torch.manual_seed(0)
    model = mae.MAE(32, 4, 192, 1, 3, 96, 1, 3)
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        if "norm" in name:
            assert (weight == float(name.endswith("weight"))).all(), name
        elif name == "patch_embed.proj.bias":  # torch's own, not 0
            assert 0.5 / 48**0.5 < weight.abs().max() <= 1 / 48**0.5
        elif name.endswith("bias"):
            assert not weight.any(), name
        elif "token" in name:
            assert weight.std().item() == pytest.approx(0.02, rel=0.25), name
        else:  # Xavier, uniform
            bound = (6 / (len(weight) + weight[0].numel())) ** 0.5
            assert 0.98 * bound < weight.abs().max() <= bound, name


def test_parameter_counts_and_released_layouts():
    """ViT-B: the official counts, and timm takes the encoder."""
    with torch.device("meta"):
        model = mae.MAE()
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == 111_655_680
    encoder = {name for name in trained if not name.startswith(("decoder", "mask"))}
    assert sum(trained[name] for name in encoder) == 85_647_360
    groups = mae.parameter_groups(model)
    assert [len(group["params"]) for group in groups] == [85, 167]
    with torch.device("meta"):
        theirs = timm.create_model("vit_base_patch16_224", num_classes=0).state_dict()
    own = mae.encoder_of(model).state_dict()
    assert {n: x.shape for n, x in own.items()} == {n: x.shape for n, x in theirs.items()}


def test_timm_computes_the_same_features():
    model = mae.MAE(**TINY)
    sizes = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=0)
    theirs = timm.models.VisionTransformer(**sizes).eval()
    theirs.load_state_dict(mae.encoder_of(model).state_dict())
    images = torch.rand(2, 3, 32, 32)
    tokens = model.encode(images, torch.arange(16).expand(2, -1))
    torch.testing.assert_close(theirs.forward_features(images), tokens, rtol=1e-5, atol=1e-5)


# ---- 2. Optimiser, schedule, training


def test_schedules_are_the_official_ones():
    names = [str(name) for name in SCHEDULE["config_fields"]]
    for case in "ABC":
        config = dict(zip(names, SCHEDULE[f"{case}_config"].tolist(), strict=True))
        images = config["batch_per_device"] * config["accum_iter"] * config["world_size"]
        per_epoch = int(config["iters_per_epoch"])
        peak = config["blr"] * images / 256
        args = SimpleNamespace(
            base_lr=config["blr"], batch_size=images, warmup=config["warmup_epochs"],
            epochs=int(config["epochs"]), final_lr=config["min_lr"] / peak,
        )  # fmt: skip
        if case == "C":
            steps = SCHEDULE["C_iters"]
            expected = SCHEDULE["C_lr"]
        else:
            assert peak == pytest.approx(SCHEDULE[f"{case}_peak"].item(), abs=1e-12)
            expected = SCHEDULE[f"{case}_lr_per_iter"]
            steps = np.arange(len(expected))
            steps = (
                steps // per_epoch * per_epoch
                + steps % per_epoch // int(config["accum_iter"]) * config["accum_iter"]
            )
        rates = [mae.schedule(int(step), per_epoch, args)["lr"] for step in steps]
        np.testing.assert_allclose(rates, expected, rtol=1e-9 * (case == "C"), atol=1e-12)
    assert mae.schedule(0, per_epoch, args) == dict(lr=0)


@pytest.mark.usefixtures("few_plates")
def test_the_optimizer_of_a_run_is_the_official_one(tmp_path, monkeypatch):
    used = []
    step = mae.mae_step

    def spied(model, optimizer, *rest):
        used.append(optimizer)
        return step(model, optimizer, *rest)

    monkeypatch.setattr(mae, "mae_step", spied)
    run(mae, tmp_path, "--steps", 1)
    (optimizer,) = used
    h = options(TRAJECTORY)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["betas"] == (h["beta1"], h["beta2"])
    assert optimizer.defaults["eps"] == h["adam_eps"]
    matrices, vectors = optimizer.param_groups
    assert matrices["weight_decay"] == h["weight_decay"] and vectors["weight_decay"] == 0
    assert {p.ndim > 1 for p in matrices["params"]} == {True}
    assert {p.ndim > 1 for p in vectors["params"]} == {False}


@DTYPES
def test_six_training_steps_are_the_official_ones(dtype):
    h = options(TRAJECTORY)
    model = mae.MAE(**TINY, norm_pix_loss=True)
    start = weights(TRAJECTORY, "sd0/")
    model.load_state_dict(start)
    model.to(dtype)
    groups = mae.parameter_groups(model)
    named = dict(model.named_parameters())
    for key, group in zip(("decay_names", "no_decay_names"), groups, strict=True):
        members = {id(p) for p in group["params"]}
        assert {n for n, p in named.items() if id(p) in members} == set(TRAJECTORY[key].tolist())
    betas = (h["beta1"], h["beta2"])
    optimizer = torch.optim.AdamW(
        groups, lr=0.0, betas=betas, weight_decay=h["weight_decay"], fused=True
    )
    per_epoch = int(h["iters_per_epoch"])
    exact = "_f64" if dtype == torch.float64 else ""
    horizon = SimpleNamespace(
        base_lr=h["peak_lr"], batch_size=256, warmup=h["warmup_epochs"],
        epochs=int(h["epochs"]), final_lr=0.0,
    )  # fmt: skip
    args = SimpleNamespace(mask_ratio=0.75, bf16=False)
    for step in range(6):
        lr = mae.schedule(step, per_epoch, horizon)["lr"]
        assert lr == pytest.approx(TRAJECTORY["lrs"][step], abs=1e-12)
        images, noise = (tensor(TRAJECTORY, x)[step] for x in ("images", "noise"))
        norms = TRAJECTORY["param_norms_f64"][step]
        assert_close(norms_of(model, start), norms, rtol=1e-6 if exact else 1e-4, atol=1e-12)
        metrics, pred, mask = mae.mae_step(model, optimizer, images.to(dtype), noise, lr, args)
        assert metrics.keys() == {"loss", "gradient_norm"}
        assert not pred.requires_grad and mask.sum(dim=1).tolist() == [12] * len(images)
        loss, norm = (metrics[name] for name in ("loss", "gradient_norm"))
        assert_close(loss, TRAJECTORY[f"losses{exact}"][step], atol=1e-7 if exact else 1e-5)
        assert_close(norm, TRAJECTORY[f"grad_norms{exact}"][step], rtol=1e-6 if exact else 1e-4)
    norms = TRAJECTORY["param_norms_f64"][6]
    assert_close(norms_of(model, start), norms, rtol=1e-6 if exact else 1e-4, atol=1e-12)
    last = ("cls_token", "mask_token", "patch_embed.proj.bias", "decoder_pred.bias", "norm.weight")
    for name in last:
        assert_close(named[name], TRAJECTORY[f"final/{name}"], atol=1e-5)


def norms_of(model, start):
    """Norm of each parameter, with the keys' biases as they were at the start.

    Their gradient is 0 in exact arithmetic, since softmax does not see what all logits share. In
    float64 Adam's epsilon holds back its rounding error, as in the recorded run; in float32 Adam
    makes steps of up to the rate of it, whose size depends on the processor."""
    norms = []
    for name in TRAJECTORY["param_names"]:
        weight = model.get_parameter(name).detach().clone()
        if name.endswith("attn.qkv.bias"):
            _, keys, _ = weight.chunk(3)
            keys.copy_(start[name].chunk(3)[1])
        norms.append(weight.norm())
    return torch.stack(norms)
