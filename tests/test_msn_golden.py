"""msn.py against the official code's numbers: loss, ViT, schedules, five training steps."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recorded import DTYPES, assert_close, assert_recorded, load, tensor, tensors

import msn

LOSS = load("msn_loss")
VIT = load("msn_vit")
SCHEDULES = load("msn_schedules")
TRAJECTORY = load("msn_trajectory")
# Zero gradient in exact arithmetic, in part (of qkv: the keys') or wholly (BatchNorm follows).
ROUNDING = "attn.qkv.bias", "encoder.norm.bias", "projector.0.bias", "projector.3.bias"


# ---- 1. Loss


@DTYPES
@pytest.mark.parametrize("weight", [1, 5])
@pytest.mark.parametrize("targets", ["plain", "sinkhorn"])
@pytest.mark.parametrize("views", ["v1", "v3"])
def test_loss_and_gradients_are_the_official_ones(views, targets, weight, dtype):
    names = [f"{views}_{name}" for name in ("anchors", "targets", "prototypes")]
    inputs = [x.requires_grad_() for x in tensors(LOSS, dtype, *names)]
    options = dict(me_max_weight=float(weight), sinkhorn=targets == "sinkhorn")
    terms = msn.msn_loss(*inputs, temperature=0.1, sharpen=0.25, **options)
    terms[0].backward()
    case = f"{views}_{targets}_w{weight}"
    for value, name in zip(terms, ("loss", "cross_entropy", "me_max"), strict=True):
        assert_recorded(value, LOSS[f"{case}_{name}"], dtype)
    anchors, labels, prototypes = inputs
    assert_recorded(anchors.grad, LOSS[f"{case}_grad_anchors"], dtype)
    assert_recorded(prototypes.grad, LOSS[f"{case}_grad_prototypes"], dtype)
    assert labels.grad is None  # labels, not something to learn


@DTYPES
@pytest.mark.parametrize("targets", ["plain", "sinkhorn"])
@pytest.mark.parametrize("views", ["v1", "v3"])
def test_assignments_are_the_official_ones(views, targets, dtype):
    """Seen through the cross-entropy of other anchors: each row's gradient shows one assignment."""
    names = [f"{views}_{name}" for name in ("targets", "prototypes", f"{targets}_assignments")]
    labels, prototypes, t = tensors(LOSS, dtype, *names)
    rng = torch.Generator().manual_seed(0)
    anchors = torch.randn(32, 24, dtype=torch.float64, generator=rng).to(dtype).requires_grad_()
    loss, cross_entropy, _ = msn.msn_loss(
        anchors, labels, prototypes, me_max_weight=0.0, sinkhorn=targets == "sinkhorn"
    )
    (gradient,) = torch.autograd.grad(cross_entropy, anchors)
    cosines = torch.cosine_similarity(anchors[:, None], prototypes[None], dim=2)
    expected = -(t.repeat(2, 1) * (cosines / 0.1).log_softmax(dim=1)).sum(dim=1).mean()
    assert_recorded(cross_entropy, expected.item(), dtype)
    assert loss.item() == cross_entropy.item()  # me_max has weight 0
    assert_recorded(gradient, torch.autograd.grad(expected, anchors)[0], dtype)


@pytest.mark.parametrize("sinkhorn", [False, True])
def test_loss_equals_a_loop(sinkhorn):
    V = 3
    B = 4
    K = 6
    rng = np.random.default_rng(0)
    anchors, targets, prototypes = (rng.normal(size=(n, 5)) for n in (V * B, B, K))

    def predict(z, temperature):
        similar = [z @ q / np.linalg.norm(z) / np.linalg.norm(q) for q in prototypes]
        p = np.exp(np.array(similar) / temperature)
        return p / sum(p)

    labels = np.array([predict(z, 0.2) ** (1 / 0.3) for z in targets])
    labels /= labels.sum(axis=1, keepdims=True)
    for _ in range(3 * sinkhorn):
        for k in range(K):
            labels[:, k] *= B / K / sum(labels[:, k])
        for b in range(B):
            labels[b] /= sum(labels[b])
    p = np.array([predict(z, 0.2) for z in anchors])
    cross_entropy = -sum(labels[i % B] @ np.log(p[i]) for i in range(V * B)) / (V * B)
    p_bar = sum(p) / (V * B)
    me_max = np.log(K) + sum(p_bar * np.log(p_bar))
    inputs = map(torch.from_numpy, (anchors, targets, prototypes))
    terms = msn.msn_loss(*inputs, 0.2, 0.3, 2.5, sinkhorn)
    expected = cross_entropy + 2.5 * me_max, cross_entropy, me_max
    np.testing.assert_allclose([term.item() for term in terms], expected, rtol=1e-12)


@pytest.mark.parametrize("sinkhorn", [False, True])
def test_me_max_is_zero_iff_the_mean_prediction_is_uniform(sinkhorn):
    z = torch.eye(8)  # each image at a prototype of its own: confident, and uniform on average
    options = dict(temperature=0.02, sinkhorn=sinkhorn)
    _, cross_entropy, me_max = msn.msn_loss(z, z, z, **options)
    assert abs(me_max) < 1e-6 and cross_entropy < 1e-6
    _, cross_entropy, me_max = msn.msn_loss(z, z, torch.ones(16, 8), **options)
    assert abs(me_max) < 1e-6 and abs(cross_entropy - np.log(16)) < 1e-5  # prototypes all alike
    _, _, me_max = msn.msn_loss(z[:1].repeat(8, 1), z, z, **options)
    assert abs(me_max - np.log(8)) < 1e-5  # all anchors at one prototype


# ---- 2. Encoder


@DTYPES
def test_vit_features_and_positions_are_the_official_ones(dtype):
    encoder = msn.VisionTransformer(32, 8, 64, 2, 2).to(dtype)
    names = [name.removeprefix("weight/") for name in VIT.files if name.startswith("weight/")]
    encoder.load_state_dict({name: tensor(VIT, f"weight/{name}", dtype) for name in names})
    native, focal = tensors(VIT, dtype, "images_native", "images_focal")
    layers = []
    tokens = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda _module, _x, output: layers.append(output[:, 0]))
    encoder.blocks[0].register_forward_pre_hook(lambda _module, inputs: tokens.append(inputs[0]))
    with torch.no_grad():
        outputs = dict(features_native=encoder(native))
        outputs["last_two_blocks_cls"] = torch.cat(layers, dim=1)
        final = encoder.norm(layers[1])  # what is hooked is what the norm gets
        outputs["features_focal"] = encoder(focal)
        patches = encoder.patch_embed["proj"](focal).flatten(2).transpose(1, 2)
        embedded = torch.cat([encoder.cls_token.expand(6, -1, -1), patches], dim=1)
        outputs["features_dropped"] = encoder(native, torch.from_numpy(VIT["kept_patches"]))
        dropped = encoder(native, torch.tensor([0]))
        kept = encoder(native, torch.arange(16))
    atol = 1e-9 if dtype == torch.float64 else 2e-5
    for name, output in outputs.items():
        assert_close(output, VIT[name], atol=atol)
    positions = VIT["position_embedding_focal"].repeat(6, axis=0)
    assert_close(tokens[1] - embedded, positions, atol=atol)
    assert_close(final, outputs["features_native"], atol=atol)
    assert_close(kept, outputs["features_native"], atol=atol)
    assert (dropped - kept).abs().max() > 0.1


# ---- 3. Schedules and optimiser


@pytest.mark.parametrize("case", ["a", "b"])
def test_schedules_are_the_official_ones(case):
    config = SCHEDULES[f"{case}_cfg_ipe_epochs_warmup_startlr_lr_finallr_wd_finalwd"].tolist()
    epoch_steps, epochs, warmup, start_lr, lr, final_lr, *weight_decay = config
    steps = len(SCHEDULES[f"{case}_lr"])
    assert steps == epoch_steps * epochs
    args = SimpleNamespace(
        epochs=int(epochs), warmup=warmup, start_lr=start_lr, lr=lr, final_lr=final_lr,
        weight_decay=weight_decay, ema=0.996,
    )  # fmt: skip
    values = [msn.schedule(i, int(epoch_steps), args) for i in range(steps)]
    for name, recorded in (("lr", "lr"), ("weight_decay", "wd"), ("ema", "ema")):
        mine = [value[name] for value in values]
        np.testing.assert_allclose(mine, SCHEDULES[f"{case}_{recorded}"], rtol=1e-9)


def small_model(dtype=torch.float64):
    """In float64: what is compared below is then no matter of rounding."""
    torch.manual_seed(0)
    encoder = msn.VisionTransformer(16, 8, 16, 1, 2, stem=[8] * 5)
    model = msn.MSN(encoder, 16, 24, 8, 12).to(dtype)
    target = copy.deepcopy(model).requires_grad_(False)
    return model, target, torch.optim.AdamW(msn.parameter_groups(model))


STEP = dict(
    temperature=0.1, sharpen=0.25, me_max_weight=1.0, sinkhorn=True, clip=3.0, bf16=False
)  # options of a step


def small_update(model, target, optimizer, weight_decay=0.1, ema=0.9, **options):
    """One update of a small model -> target view, metrics."""
    rng = torch.Generator().manual_seed(1)
    sizes = ((6, 16), (12, 16), (6, 8))  # the target view, two full-size anchors, a focal one
    views = [torch.randn(n, 3, size, size, generator=rng) for n, size in sizes]
    views = [view.to(model.prototypes) for view in views]
    keep = torch.tensor([3, 0, 2])
    rates = dict(lr=0.01, weight_decay=weight_decay, ema=ema)
    args = SimpleNamespace(**STEP | options)
    metrics = msn.msn_step(model, target, optimizer, views[0], views[1:], keep, rates, args)
    return views[0], metrics


def rounding_before(norm, calls, more=0):
    """How far from 0, at most, rounding takes the gradient of a bias before a BatchNorm: (D,).

    In exact arithmetic it is 0: the sum over n images of s (g_i - mean(g) - x_i mean(g x)), where
    g is the gradient of BatchNorm's output and x its normalised input, s (input - mean), of mean 0
    and square 1. A sum of n rounded numbers is off by up to n u times the sum of their absolute
    values, u = 2^-24 in float32. Here the means are such sums, and then the sum of all is: 2 n u.
    Each of its parts comes from six more operations, and goes through so many `more` as given.
    Inputs count before their mean is subtracted, since an error of that mean is in every x_i."""
    bound = 0.0
    for inputs, gradient in calls:  # (n, D) each, one pair a call
        n = len(inputs)
        variance, mean = torch.var_mean(inputs, dim=0, correction=0)
        s = (variance + norm.eps).rsqrt()
        slope = (gradient * s * (inputs - mean)).mean(dim=0).abs()
        parts = gradient.abs() + gradient.mean(dim=0).abs()
        parts += s * (inputs.abs() + mean.abs()) * slope
        u = torch.finfo(inputs.dtype).eps / 2
        bound += (2 * n + 6 + more) * u * s * norm.weight.detach().abs() * parts.sum(dim=0)
    return bound


def watch(norm):
    """-> a list that gets (input, gradient of the output) of each call of a BatchNorm."""
    calls = []

    def keep(_, inputs, output):
        output.register_hook(lambda gradient: calls.append((inputs[0].detach(), gradient)))

    norm.register_forward_hook(keep)
    return calls


@DTYPES
def test_every_parameter_learns_and_the_target_follows(dtype):
    model, target, optimizer = small_model(dtype)
    before = copy.deepcopy(model)
    old = copy.deepcopy(target)
    projector = model.projector
    norms = {f"projector.{i - 1}.bias": projector[i] for i in (1, 4)}
    calls = {name: watch(norm) for name, norm in norms.items()}
    _, metrics = small_update(model, target, optimizer, clip=1e9)  # gradients as they came
    in_groups = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, in_groups)) == sorted(map(id, model.parameters()))
    bounds = {name: rounding_before(norms[name], calls[name]) for name in norms}
    # The encoder's last shift is the same for all images too: its gradient is that of the next
    # bias times the weights (24, 16), a sum of 24 products.
    bias = rounding_before(projector[1], calls["projector.0.bias"], more=24)
    bounds["encoder.norm.bias"] = bias @ before.projector[0].weight.detach().abs()
    learnt = []
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all(), name
        if name in bounds:
            assert (p.grad.abs() <= bounds[name]).all(), name
        else:
            learnt.append(p.grad.abs().max())
            assert not torch.equal(p, before.get_parameter(name)), name
    assert min(learnt) > max(bound.max() for bound in bounds.values())
    for name, p in target.named_parameters():
        assert p.grad is None and not p.requires_grad, name
        expected = 0.9 * old.get_parameter(name) + 0.1 * model.get_parameter(name)
        torch.testing.assert_close(p, expected)
    of_terms = {"loss", "cross_entropy", "me_max", "entropy", "information", "gradient_norm"}
    assert metrics.keys() == of_terms
    assert all(metric.shape == () for metric in metrics.values())


def test_metrics_are_those_of_the_mean_prediction_before_the_update():
    model, target, optimizer = small_model()
    prototypes = model.prototypes.detach().clone()
    outputs = []
    model.register_forward_hook(lambda _module, _inputs, output: outputs.append(output[0]))
    _, metrics = small_update(model, target, optimizer)
    (anchors,) = outputs
    cosine = torch.cosine_similarity(anchors.detach()[:, None], prototypes, dim=2)
    p = (cosine / 0.1).softmax(dim=1)
    usage = p.mean(dim=0)
    entropy = -(usage * usage.log()).sum()
    torch.testing.assert_close(metrics["entropy"], entropy)
    torch.testing.assert_close(metrics["me_max"], math.log(12) - entropy)
    divergence = (p * (p / usage).log()).sum(dim=1).mean()  # of a prediction from the mean
    torch.testing.assert_close(metrics["information"], divergence)
    assert not metrics["entropy"].requires_grad


def test_information_is_0_when_all_images_have_one_prediction():
    """Also one that is not flat: there sharpened targets have a cross-entropy below the entropy."""
    model, target, optimizer = small_model()
    with torch.no_grad():
        for network in (model, target):
            network.projector[-1].weight.zero_()
            network.projector[-1].bias.copy_(network.prototypes[3])
    _, metrics = small_update(model, target, optimizer, sinkhorn=False)
    assert metrics["information"].abs() < 1e-12
    assert metrics["entropy"] - metrics["cross_entropy"] > 0.1


def test_target_uses_batch_statistics_and_keeps_its_own():
    model, target, optimizer = small_model()
    for network in (model, target):  # if these were used, embeddings would be far off
        for buffer in network.projector.buffers():
            buffer.add_(3)
    untouched = copy.deepcopy(target)
    own = copy.deepcopy(target).train()
    outputs = []
    target.register_forward_hook(lambda _module, _inputs, output: outputs.append(output[0]))
    target_view, _ = small_update(model, target, optimizer)
    with torch.no_grad():
        expected, _ = own([target_view])
        by_running, _ = untouched.eval()([target_view])
    torch.testing.assert_close(outputs, [expected])
    assert (expected - by_running).abs().max() > 0.1
    moved = 0
    for name, buffer in target.named_buffers():
        torch.testing.assert_close(buffer, own.get_buffer(name))
        moved += not torch.equal(buffer, untouched.get_buffer(name))
        assert not torch.equal(buffer, model.get_buffer(name)), name
    assert moved == 7 * 3  # five layers in the stem, two in the projector: mean, variance, count


def test_weight_decay_is_for_weights_only():
    results = []
    for decay in (0.0, 0.25):
        model, target, optimizer = small_model()
        start = copy.deepcopy(model)
        small_update(model, target, optimizer, weight_decay=decay)
        results.append(model)
    without, decayed = results
    names = []
    for name, p in decayed.named_parameters():
        change = p - without.get_parameter(name)
        if p.ndim > 1 and name != "prototypes":  # decoupled: lr * decay * weight
            expected = -0.01 * 0.25 * start.get_parameter(name)
            torch.testing.assert_close(change, expected, rtol=1e-9, atol=1e-15)
            assert change.abs().max() > 1e-5
            names.append(name)
        else:
            assert not change.any(), name
    assert {"encoder.cls_token", "encoder.pos_embed"} <= set(names)
    assert len(names) == 2 + 6 + 4 + 3  # and the stem's, the block's and the projector's weights


def test_prototypes_are_not_clipped_and_the_network_is():
    gradients = []
    for clip in (1e9, 1e-3):
        model, target, optimizer = small_model()
        _, metrics = small_update(model, target, optimizer, clip=clip)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    free, clipped = gradients
    assert torch.equal(clipped.pop("prototypes"), free.pop("prototypes"))
    free, clipped = (torch.cat([g.flatten() for g in x.values()]) for x in gradients)
    assert abs(clipped.norm() - 1e-3) < 1e-6  # torch divides by the norm + 1e-6
    torch.testing.assert_close(metrics["gradient_norm"], free.norm())  # that before clipping


# ---- 4. Five training steps


@DTYPES
def test_five_steps_are_the_official_ones(dtype):
    exact = dtype == torch.float64
    config = TRAJECTORY["cfg_ipe_epochs_warmup_startlr_lr_finallr_wd_finalwd_clip"].tolist()
    epoch_steps, epochs, warmup_steps, start_lr, lr, final_lr, *weight_decay, clip = config
    heads = {"fc.fc1": "projector.0", "fc.bn1": "projector.1", "fc.fc2": "projector.3"}
    heads |= {"fc.bn2": "projector.4", "fc.fc3": "projector.6"}

    def rename(name):
        layer, _, kind = name.rpartition(".")
        return f"{heads[layer]}.{kind}" if layer in heads else f"encoder.{name}"

    def state(prefix):
        names = [name for name in TRAJECTORY.files if name.startswith(f"{prefix}/")]
        arrays = {rename(name.split("/")[1]): torch.from_numpy(TRAJECTORY[name]) for name in names}
        return arrays | {"prototypes": torch.from_numpy(TRAJECTORY[f"{prefix}_prototypes"])}

    model = msn.MSN(msn.VisionTransformer(32, 8, 64, 2, 2), 64, 48, 24, 32)
    model.load_state_dict(state("init"))
    model = model.to(dtype)
    target = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(msn.parameter_groups(model))
    order = [rename(str(name)) for name in TRAJECTORY["param_names"]]
    assert set(order) | {"prototypes"} == {name for name, _ in model.named_parameters()}
    horizon = SimpleNamespace(
        epochs=int(epochs), warmup=warmup_steps / epoch_steps, start_lr=start_lr, lr=lr,
        final_lr=final_lr, weight_decay=weight_decay, ema=0.996,
    )  # fmt: skip
    args = SimpleNamespace(**STEP | dict(clip=clip))
    for i in range(5):
        first, rand, focal, kept = (
            torch.from_numpy(TRAJECTORY[name][i])
            for name in ("target_views", "rand_views", "focal_views", "kept_patches")
        )
        anchor_views = [rand.flatten(0, 1).to(dtype), focal.flatten(0, 1).to(dtype)]
        rates = msn.schedule(i, int(epoch_steps), horizon)
        for name, key in (("lr", "lr"), ("weight_decay", "wd"), ("ema", "ema")):
            np.testing.assert_allclose(rates[name], TRAJECTORY[f"step_{key}"][i], rtol=1e-9)
        metrics = msn.msn_step(
            model, target, optimizer, first.to(dtype), anchor_views, kept, rates, args
        )
        for name in ("loss", "cross_entropy", "me_max"):
            assert_recorded(metrics[name], TRAJECTORY[f"step_{name}"][i], dtype, rtol=1e-8)
        assert TRAJECTORY["step_grad_norm"][i] > clip  # the metric is the norm before clipping
        rtol = 1e-8 if exact else 1e-4
        norm = metrics["gradient_norm"].item()
        np.testing.assert_allclose(norm, TRAJECTORY["step_grad_norm"][i], rtol=rtol)
        for network, key in ((model, "param_norms"), (target, "target_param_norms")):
            norms = [network.get_parameter(name).detach().norm().item() for name in order]
            expected = TRAJECTORY[f"step_{key}"][i]
            if exact:  # atol: for those that are zero but for rounding
                np.testing.assert_allclose(norms, expected, rtol=1e-8, atol=1e-10)
    start = state("init")
    end = state("final")
    for name in [*order, "prototypes"]:
        mine = model.get_parameter(name).detach().double()
        theirs = end[name].double()
        if exact:  # stored as float32
            torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)
        elif name.endswith(ROUNDING):
            # In float64 Adam's epsilon holds back what is rounding; in float32 it does not, and an
            # update of Adam is at most 1.02 times the rate as long as there are no more than five.
            limit = 1.02 * TRAJECTORY["step_lr"].sum()
            torch.testing.assert_close(mine, theirs, rtol=0, atol=limit)
        else:
            assert (mine - theirs).norm() <= 1e-3 * (theirs - start[name]).norm(), name
