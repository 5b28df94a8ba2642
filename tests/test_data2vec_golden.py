"""data2vec.py against the official code's numbers: masks, targets, loss, network, training."""

import copy
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from recorded import DTYPES, assert_close, load, options, tensor
from test_msn_views import changed_by_torchvision
from torchvision.transforms.v2 import functional as TF

import data2vec

MASKS = load("data2vec_masks")
TARGETS = load("data2vec_targets")
FORWARD = load("data2vec_forward")
EMA = load("data2vec_ema")
TRAJECTORY = load("data2vec_trajectory")
TINY = dict(image_size=32, patch_size=8, dim=40, depth=4, heads=4)
OTHER_NORMS = ["postln_only", "perlayerln_only", "instnorm_then_perlayerln", "plain_average"]


def ours(name):
    """The name in Data2Vec of an official tensor."""
    return name if name.startswith(("mask_token", "lm_head")) else f"encoder.{name}"


def recorded(golden, prefix, dtype):
    """The network of recorded weights, loaded strictly."""
    names = [name for name in golden.files if name.startswith(prefix) and "index" not in name]
    tensors = {ours(n.removeprefix(prefix)): torch.from_numpy(golden[n]).float() for n in names}
    model = data2vec.Data2Vec(data2vec.BeiT(**TINY), TINY["dim"])
    model.load_state_dict(tensors)
    return model.to(dtype)


# ---- 1. Masks and views


def test_masks_are_the_official_ones_draw_by_draw():
    for seed, expected in zip(MASKS["example_seeds"], MASKS["example_masks"]):
        random.seed(int(seed))
        mask = data2vec.block_mask(14, 120)
        assert mask.dtype == torch.bool and mask.shape == (14, 14)
        assert_close(mask, expected)
        assert torch.equal(data2vec.block_mask(14, 120, rng=random.Random(int(seed))), mask)
    random.seed(0)
    masks = torch.stack([data2vec.block_mask(14, 120) for _ in range(2000)])
    assert_close(masks.sum(dim=(1, 2)), MASKS["official/counts"])
    assert_close(masks.double().mean(dim=0), MASKS["official/position_frequency"], atol=1e-9)
    random.seed(0)
    fewer = [int(data2vec.block_mask(14, 75).sum()) for _ in range(2000)]
    np.testing.assert_array_equal(fewer, MASKS["beit75/counts"])


def test_a_mask_is_a_function_of_seed_step_and_place_in_the_global_batch(monkeypatch):
    args = SimpleNamespace(image_size=8, patch_size=1, num_masked=39, min_block=4, flip=0.0)
    images = torch.zeros(6, 1, 8, 8, dtype=torch.uint8)

    def masks(rank, processes, step, seed=0):
        monkeypatch.setattr(data2vec, "rank", lambda: rank)
        monkeypatch.setattr(data2vec, "world_size", lambda: processes)
        args.seed = seed
        args.batch_size = 6
        views = data2vec.CroppedViews(images, [(1, 8, [1.0, 1.0])], args)
        crops, mask = data2vec.MaskedViews(views, args)[step, list(range(6 // processes))]
        assert crops.shape == (1, 6 // processes, 3, 8, 8)
        return mask

    whole = masks(0, 1, 3)
    assert whole.shape == (6, 64) and whole.dtype == torch.bool and len(whole.unique(dim=0)) == 6
    assert torch.equal(whole, torch.cat([masks(0, 2, 3), masks(1, 2, 3)]))
    assert not torch.equal(whole, masks(0, 1, 4)) and not torch.equal(whole, masks(0, 1, 3, 1))


@pytest.mark.parametrize("drop_path", [0.0, 0.25])
def test_inputs_are_jittered_and_normalised_crops(drop_path):
    """All of them are jittered, as torchvision does it from the same random numbers."""
    rng = torch.Generator().manual_seed(0)
    crops = torch.randint(256, (1, 6, 3, 8, 8), generator=rng, dtype=torch.uint8)
    args = SimpleNamespace(
        jitter=[0.4, 0.4, 0.4, 0.1], standardise=True, drop_path=drop_path, depth=3
    )
    torch.manual_seed(5)
    images, paths = data2vec.data2vec_inputs(crops, args, torch.device("cpu"))
    torch.manual_seed(5)
    shifts = torch.tensor(args.jitter) * (2 * torch.rand(1, 6, 4)[0] - 1)
    order = torch.randperm(4).tolist()
    torch.rand(1, 6)  # who is jittered
    theirs = []
    for crop, shift in zip(crops[0], shifts.tolist()):
        image = TF.to_dtype(crop, torch.float32, scale=True)
        for kind in order:
            image = changed_by_torchvision(image, kind, shift[kind])
        theirs.append((image - image.mean()) / (image.std() + 1e-3))
    torch.testing.assert_close(images, torch.stack(theirs), rtol=0, atol=1e-4)
    if drop_path:
        expected = data2vec.drop_paths(torch.rand(3, 2, 6), 0.25)
        assert torch.equal(paths, expected) and paths.shape == (3, 2, 6, 1, 1)
    else:
        assert paths is None


# ---- 2. Targets and loss


def test_targets_and_loss_are_the_official_ones():
    layers = tensor(TARGETS, "teacher_layers")
    mask = tensor(TARGETS, "mask", torch.bool).flatten(1)
    pred = tensor(TARGETS, "predictions").requires_grad_()
    target = data2vec.data2vec_targets(layers)
    assert target.dtype == torch.float32
    assert_close(target, TARGETS["target_all/official"], atol=1e-5)
    assert torch.equal(data2vec.data2vec_targets(list(layers)), target)
    assert_close(target[mask], TARGETS["target_masked/official"], atol=1e-5)
    loss = data2vec.data2vec_loss(pred[mask], target[mask])
    assert_close(loss, TARGETS["loss_beta2/official"], atol=2e-6)
    loss.backward()
    assert_close(pred.grad, TARGETS["grad_beta2/official"], atol=1e-7)
    loss = data2vec.data2vec_loss(pred[mask], target[mask], beta=0.12)
    assert_close(loss, TARGETS["loss_beta0p12/official"], atol=1e-5)
    eight = data2vec.data2vec_targets(layers, top_k=8)[mask]
    assert_close(
        data2vec.data2vec_loss(pred[mask], eight), TARGETS["loss_beta2/official_K8"], atol=1e-5
    )


@pytest.mark.parametrize("other", OTHER_NORMS)
def test_other_normalisations_give_another_loss(other):
    mask = tensor(TARGETS, "mask", torch.bool).flatten(1)
    target = data2vec.data2vec_targets(tensor(TARGETS, "teacher_layers"))
    loss = data2vec.data2vec_loss(tensor(TARGETS, "predictions")[mask], target[mask])
    assert abs(loss.item() - TARGETS[f"loss_beta2/{other}"]) > 1e-3
    assert abs(target.numpy() - TARGETS[f"target_all/{other}"]).max() > 1e-2


def test_the_loss_equals_a_loop_and_is_of_at_least_single_precision():
    pred, target = torch.randn(2, 50, 7, dtype=torch.float64) * 2
    gaps = [abs(a - b) for a, b in zip(pred.flatten().tolist(), target.flatten().tolist())]
    mean = sum(d * d / 4 if d < 2 else d - 1 for d in gaps) / len(gaps)
    assert data2vec.data2vec_loss(pred, target).item() == pytest.approx(mean, rel=1e-12)
    assert data2vec.data2vec_loss(pred.bfloat16(), target.float()).dtype == torch.float32
    assert data2vec.data2vec_targets(torch.randn(3, 2, 5, 8).bfloat16(), 2).dtype == torch.float32


# ---- 3. Network


@DTYPES
def test_the_network_is_the_official_one(dtype):
    images = tensor(FORWARD, "images", dtype)
    mask = tensor(FORWARD, "mask", torch.bool).flatten(1)
    student = recorded(FORWARD, "student/", dtype)
    target = recorded(FORWARD, "teacher/", dtype)
    encoder = student.encoder
    assert_close(encoder.index, FORWARD["relative_position_index"])
    bias = encoder.rel_pos_bias.relative_position_bias_table[encoder.index].permute(2, 0, 1)
    assert_close(bias, FORWARD["rel_pos_bias_student"])
    layers = target.encoder(images)
    patches = torch.stack([x[:, 1:] for x in layers])
    assert_close(patches, FORWARD["teacher_layers"], atol=2e-5)
    everywhere = torch.ones_like(mask)
    hidden = encoder.norm(encoder(images, mask, student.mask_token)[-1][:, 1:])
    assert_close(student.lm_head(hidden), FORWARD["student_pred_all"], atol=2e-5)
    assert student(images, everywhere).shape == (48, 40)
    pred = student(images, mask)
    assert_close(pred, FORWARD["pred_masked"], atol=2e-5)
    y = data2vec.data2vec_targets(layers, top_k=3)[mask]
    assert_close(y, FORWARD["target_masked"], atol=2e-5)
    loss = data2vec.data2vec_loss(pred, y)
    assert_close(loss, FORWARD["loss_f64"], atol=2e-6)
    loss.backward()
    gradients = {name: p.grad for name, p in student.named_parameters()}
    norms = torch.stack([gradients[ours(name)].norm() for name in FORWARD["grad_names"]])
    assert_close(norms, FORWARD["grad_norms_f64"], rtol=1e-4)
    for name in ("mask_token", "rel_pos_bias.relative_position_bias_table"):
        assert_close(gradients[ours(name)], FORWARD[f"grad/{name}"], atol=1e-6)


def test_sizes_names_and_initial_weights_are_the_official_ones():
    with torch.device("meta"):
        model = data2vec.Data2Vec(data2vec.BeiT(image_size=224), 768)
    assert sum(p.numel() for p in model.parameters()) == 86_256_720
    torch.manual_seed(0)
    encoder = data2vec.BeiT(image_size=32, patch_size=4, dim=192, depth=3, heads=3)
    model = data2vec.Data2Vec(encoder, 192)
    for weight in (encoder.patch_embed["proj"].weight, encoder.blocks[0].attn["qkv"].weight):
        assert weight.std().item() == pytest.approx(0.0108, rel=0.03) and weight.abs().max() <= 0.02
    for number, block in enumerate(encoder.blocks, 1):
        for layer in (block.attn["proj"], block.mlp["fc2"]):
            limit = 0.02 / math.sqrt(2 * number)
            assert 0.99 * limit < layer.weight.abs().max() <= limit * 1.000001
            assert not layer.bias.any()
        assert (block.gamma_1 == 1e-4).all() and (block.gamma_2 == 1e-4).all()
        assert not block.attn.q_bias.any() and not block.attn.v_bias.any()
    assert not encoder.rel_pos_bias.relative_position_bias_table.any()
    for token in (encoder.cls_token, model.mask_token, model.lm_head.weight):
        assert 0 < token.abs().max() <= 0.02
    assert not encoder.patch_embed["proj"].bias.any() and not model.lm_head.bias.any()


def test_timm_has_the_same_encoder():
    options = dict(img_size=32, patch_size=8, embed_dim=40, depth=4, num_heads=4, num_classes=0)
    options |= dict(use_abs_pos_emb=False, use_shared_rel_pos_bias=True, init_values=0.1)
    theirs = timm.models.beit.Beit(**options, global_pool="token").eval()
    encoder = recorded(FORWARD, "student/", torch.float32).encoder
    theirs.load_state_dict(encoder.state_dict())  # strictly
    images = tensor(FORWARD, "images")
    expected = theirs.forward_features(images)
    torch.testing.assert_close(encoder.norm(encoder(images)[-1]), expected, rtol=1e-5, atol=1e-5)


def test_random_depth_drops_branches_and_keeps_their_mean():
    torch.manual_seed(0)
    factors = data2vec.drop_paths(torch.rand(5, 2, 40_000), 0.4)
    assert factors.shape == (5, 2, 40_000, 1, 1) and (factors[0] == 1).all()
    for factor, rate in zip(factors, (0, 0.1, 0.2, 0.3, 0.4)):
        assert sorted(factor.unique().tolist()) == pytest.approx(
            sorted({0, 1 / (1 - rate)} if rate else {1})
        )
        assert (factor == 0).double().mean().item() == pytest.approx(rate, abs=0.01)
        assert factor.mean().item() == pytest.approx(1, abs=0.01)
    encoder = recorded(FORWARD, "student/", torch.float64).encoder
    images = torch.randn(2, 3, 32, 32).double()
    paths = torch.ones(4, 2, 2, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(encoder(images, paths=paths)[-1], encoder(images)[-1])
    paths[3, :, 1] = 0  # the second image leaves out the last block
    outputs = encoder(images, paths=paths)
    assert torch.equal(outputs[3][1], outputs[2][1])
    assert not torch.equal(outputs[3][0], outputs[2][0])
    noisy = [encoder(images, dropout=0.5)[-1] for _ in range(2)]
    assert not torch.equal(*noisy)


# ---- 4. Schedules and training


def rates(count, epoch_steps=1, **options):
    """Learning rates and EMA decays of the first `count` updates."""
    steps = [data2vec.schedule(i, epoch_steps, SimpleNamespace(**options)) for i in range(count)]
    return torch.tensor([[x["lr"], x["ema"]] for x in steps], dtype=torch.float64).T


def test_schedules_are_the_official_ones():
    peak, low, epochs, per_epoch, warmup = EMA["lr_cosine_config"].tolist()
    per_epoch = int(per_epoch)
    options = dict(lr=peak, final_lr=low, ema=[0.999, 0.9998])
    recorded_run = options | dict(epoch_steps=per_epoch, epochs=int(epochs), warmup=warmup)
    lr, decay = rates(40, **recorded_run, ema_anneal=12 / per_epoch)
    assert_close(lr, EMA["lr_cosine"], atol=1e-12)
    kept = [*range(12), *range(15, 20)]  # between, the official code keeps its last value
    assert_close(decay[kept], EMA["anneal_decay"][kept], atol=1e-9)
    _, decay = rates(20, **recorded_run, ema_anneal=20 / per_epoch)
    assert_close(decay, EMA["anneal_to_end_decay"], atol=1e-9)
    _, decay = rates(10, **recorded_run, ema_anneal=0)
    assert_close(decay, EMA["vitb_recipe_decay"], atol=1e-9)
    paper = data2vec.parse_args(["--recipe", "paper"])  # of 625 steps an epoch
    lr = [data2vec.schedule(i, 625, paper)["lr"] for i in EMA["vitb_lr_iters"].tolist()]
    assert_close(torch.tensor(lr, dtype=torch.float64), EMA["vitb_lr"], rtol=1e-9)
    decay = [data2vec.schedule(i, 625, paper)["ema"] for i in range(10)]
    np.testing.assert_allclose(decay, EMA["vitb_recipe_decay"], rtol=0, atol=1e-9)
    for warmup in (0, 1):
        lr, _ = rates(4, warmup=warmup, epochs=4, ema_anneal=0, **options)
        assert lr[warmup] == peak and lr.isfinite().all()


@DTYPES
def test_six_steps_are_the_official_ones(dtype):
    h = options(TRAJECTORY)
    model = recorded(TRAJECTORY, "sd0/", dtype)
    target = copy.deepcopy(model).requires_grad_(False)
    groups = data2vec.parameter_groups(model)
    named = {p: name.removeprefix("encoder.") for name, p in model.named_parameters()}
    for group, kind in zip(groups, ("decay_names", "no_decay_names")):
        assert {named[p] for p in group["params"]} == set(TRAJECTORY[kind].tolist())
    assert "weight_decay" not in groups[0] and groups[1]["weight_decay"] == 0
    optimizer = torch.optim.AdamW(groups, 0.0, weight_decay=h["weight_decay"], fused=True)
    per_epoch = int(h["iters_per_epoch"])
    args = SimpleNamespace(
        warmup=h["warmup_epochs"], epochs=6 // per_epoch, lr=h["peak_lr"], final_lr=h["min_lr"],
        ema=[h["ema_decay_init"], h["ema_decay_end"]], ema_anneal=h["ema_start_at"] / per_epoch,
        top_k=3, beta=2.0, attention_dropout=0.0, clip=h["clip_norm"], bf16=False,
    )  # fmt: skip
    assert args.epochs * per_epoch == 6
    networks = [(model, "student"), (target, "teacher")]
    precise = dtype == torch.float64
    suffix = "_f64" if precise else ""
    for step in range(6):
        images = tensor(TRAJECTORY, "images", dtype)[step]
        mask = tensor(TRAJECTORY, "mask", torch.bool)[step].flatten(1)
        now = data2vec.schedule(step, per_epoch, args)
        assert now["lr"] == pytest.approx(TRAJECTORY["lrs"][step], abs=1e-12)
        metrics = data2vec.data2vec_step(model, target, optimizer, images, mask, None, now, args)
        assert metrics.keys() == {"loss", "target_std", "gradient_norm"}
        loss, norm = (metrics[name] for name in ("loss", "gradient_norm"))
        assert_close(loss, TRAJECTORY[f"losses{suffix}"][step], atol=2e-6 if precise else 1e-5)
        assert_close(norm, TRAJECTORY[f"grad_norms_before_clip{suffix}"][step], rtol=1e-4)
        for network, kind in networks:
            tensors = dict(network.named_parameters())
            norms = [tensors[ours(name)].norm() for name in TRAJECTORY["param_names"]]
            expected = TRAJECTORY[f"{kind}_norms{suffix}"][step + 1]
            assert_close(torch.stack(norms), expected, rtol=1e-4)
    for network, kind in networks:
        tensors = dict(network.named_parameters())
        for name in ("mask_token", "lm_head.bias", "norm.weight", "cls_token"):
            assert_close(tensors[ours(name)], TRAJECTORY[f"final_{kind}/{name}"], atol=1e-5)
