"""linear_eval.load_encoder: files as trainers write them, against the networks of timm and
torchvision. Each is tiny; what cannot be read is refused in one line."""

import argparse
import collections
import datetime
import json
import os
import pathlib
import pickle
import re
import sys
import types

import numpy as np
import pytest
import timm
import torch
from torchvision import models

import linear_eval

VIT = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1)
BEIT = VIT | dict(use_abs_pos_emb=False, use_shared_rel_pos_bias=True, init_values=0.1)
DATA = ["--data", "plates"]


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


def shaken(network):
    """In evaluation mode, no weight at its initial 0 or 1."""
    torch.manual_seed(0)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.1 * torch.randn_like(tensor).abs())
    return network.eval()


def vit(**options):
    return shaken(timm.models.VisionTransformer(**(VIT | dict(num_classes=0) | options)))


def prefixed(prefix, state):
    return {prefix + name: x for name, x in state.items()}


@pytest.fixture(scope="module")
def plain():
    return vit()


def load(state, tmp_path, **options):
    torch.save(state, tmp_path / "released.pth")
    return linear_eval.load_encoder(tmp_path / "released.pth", **options)


def refusal(path, capsys, **options):
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        linear_eval.load_encoder(path, **options)
    message = capsys.readouterr().err
    assert error.value.code == 2 and message.count("\n") == 1 and len(message) < 500, message
    assert str(path) in message or "--heads" in message
    assert "\x1b" not in message and "weights_only" not in message
    return message


def refused(state, tmp_path, capsys, **options):
    torch.save(state, tmp_path / "refused.pth")
    return refusal(tmp_path / "refused.pth", capsys, **options)


def assert_equals_timm(encoder, theirs, pooled="token"):
    """pooled: what timm's own classifier reads; "avg": the mean of the patches."""
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    found = linear_eval.features(encoder, images)
    with torch.no_grad():
        tokens = theirs.forward_features(linear_eval.normalise(images.float() / 255, False))
        head = theirs.forward_head(tokens, pre_logits=True)
    front = theirs.num_prefix_tokens
    expected = dict(patches=tokens[:, front:].mean(dim=1))
    if pooled == "avg":
        expected["patches"] = head
    elif theirs.cls_token is not None:
        torch.testing.assert_close(head, tokens[:, 0])
    if theirs.cls_token is not None:
        expected["cls"] = tokens[:, 0]
        assert found.keys() == {"cls", "raw", "cls4", "patches"}
    else:
        assert found.keys() == {"patches"}
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-5, atol=1e-5)
    control = linear_eval.untrained(encoder)  # it has the same features
    other = linear_eval.features(control, images)
    assert {k: x.shape for k, x in other.items()} == {k: x.shape for k, x in found.items()}
    assert not any(torch.equal(other[name], x) for name, x in found.items())


# ---- Other sizes and parts


@pytest.mark.parametrize(
    "options",
    [
        dict(mlp_ratio=3),
        dict(qkv_bias=False),
        dict(init_values=0.1),
        dict(init_values=0.1, reg_tokens=4),
        dict(reg_tokens=4, no_embed_class=True),
        dict(no_embed_class=True),
        dict(img_size=32, patch_size=16),
        dict(global_pool="avg", fc_norm=True),
        dict(global_pool="avg", fc_norm=False),
        dict(global_pool="avg", reg_tokens=2),
        dict(class_token=False, global_pool="avg"),
        dict(class_token=False, global_pool="avg", fc_norm=False),
    ],
    ids=str,
)
def test_a_vit_gives_timms_features(options, tmp_path):
    theirs = vit(**options)
    encoder = load(theirs.state_dict(), tmp_path)
    assert_equals_timm(encoder, theirs, pooled=options.get("global_pool", "token"))


def test_a_norm_before_the_mean_and_one_after_it(tmp_path):
    theirs = vit(global_pool="avg", fc_norm=True)
    theirs.norm = shaken(torch.nn.LayerNorm(64, eps=1e-6))
    assert_equals_timm(load(theirs.state_dict(), tmp_path), theirs, pooled="avg")


@pytest.mark.parametrize("pooled", ["token", "avg"])
@pytest.mark.parametrize("scale", [0.1, None])
def test_a_beit_gives_timms_features(pooled, scale, tmp_path):
    options = BEIT | dict(init_values=scale, num_classes=0, global_pool=pooled)
    theirs = shaken(timm.models.beit.Beit(**options))
    theirs.num_prefix_tokens = 1
    assert_equals_timm(load(theirs.state_dict(), tmp_path), theirs, pooled=pooled)


def test_dinov2_gives_its_registers_no_positions(tmp_path):
    theirs = vit(reg_tokens=4, init_values=0.1)
    theirs.pos_embed.data[:, 1:5] = 0
    state = theirs.state_dict()
    state["register_tokens"] = state.pop("reg_token")
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], state["pos_embed"][:, 5:]], dim=1)
    state["mask_token"] = torch.ones(1, 64)
    encoder = load({"teacher": prefixed("backbone.", state)}, tmp_path)
    assert_equals_timm(encoder, theirs)
    control = linear_eval.untrained(encoder)  # these positions are learned, unlike MAE's
    assert not torch.equal(control.pos_embed, encoder.pos_embed)


def test_heads_are_said_and_can_be_given(tmp_path, capsys):
    theirs = vit(embed_dim=384, num_heads=12)
    state = theirs.state_dict()
    encoder = load(state, tmp_path)
    assert encoder.options["heads"] == 6
    line = capsys.readouterr().out
    for part in ("32 x 32", "patches of 8", "width 384", "depth 2", "heads 6", "--heads", "pixels"):
        assert part in line
    assert_equals_timm(load(state, tmp_path, heads=12), theirs)
    assert "guess" not in capsys.readouterr().out
    moco = load({"state_dict": prefixed("module.momentum_encoder.", state)}, tmp_path)
    assert_equals_timm(moco, theirs)  # MoCo v3 has only this ViT-S
    load(state, tmp_path, plain_pixels=True)
    assert "pixels as they are" in capsys.readouterr().out
    assert "--heads 7" in refused(state, tmp_path, capsys, heads=7)
    assert "give --heads" in refused(vit(embed_dim=96).state_dict(), tmp_path, capsys)
    resnet = models.resnet18().state_dict()
    assert "ResNet" in refused(resnet, tmp_path, capsys, heads=3)
    beit = timm.models.beit.Beit(**BEIT, num_classes=0).state_dict()
    assert "table" in refused(beit, tmp_path, capsys, heads=2)
    own = dict(options=dict(data="plates", image_size=32, script="msn"), encoder=state, step=1)
    assert "has its own" in refused(own, tmp_path, capsys, heads=2)


@pytest.mark.parametrize(
    "network, words",
    [
        (lambda: vit(img_size=(32, 64)), "square"),
        (lambda: vit(img_size=(16, 72)), "square"),
        (lambda: vit(pos_embed="none"), "without pos_embed"),
        (lambda: vit(qk_norm=True), "blocks.0.attn.q_norm.weight"),
        (lambda: vit(pre_norm=True), "norm_pre.weight"),
        (lambda: vit(global_pool="map"), "attn_pool"),
        (lambda: vit(in_chans=1), "[64, 1, 8, 8]"),
        (lambda: timm.create_model("deit_tiny_distilled_patch16_224"), "dist_token"),
        (lambda: timm.create_model("eva02_tiny_patch14_224"), "blocks.0.attn.q_bias"),
        (
            lambda: timm.models.beit.Beit(
                **VIT, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1
            ),
            "without pos_embed",
        ),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224"), "without pos_embed"),
        (lambda: timm.create_model("convnext_atto"), "it has stem.0.weight"),
        (lambda: timm.create_model("resnet10t"), "it has conv1.0.weight"),
        (lambda: timm.create_model("resnext26ts"), "no encoder"),
        (lambda: timm.create_model("seresnet18"), "se.fc1"),
        (lambda: models.resnet34(), "[3, 4, 6, 3]"),
        (lambda: models.resnet101(), "[3, 4, 23, 3]"),
        (lambda: models.ResNet(models.resnet.Bottleneck, [3, 4, 6, 3], width_per_group=8), "layer"),
    ],
)
def test_networks_that_are_not_built_are_refused(network, words, tmp_path, capsys):
    message = refused(network().state_dict(), tmp_path, capsys)
    assert words in message and message.endswith(": give another\n")


# ---- What trainers write


def optimizer():
    return {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-3}]}


LAYOUTS = {
    "MAE": lambda x: dict(
        model=x | {"mask_token": torch.ones(1, 1, 8), "decoder_embed.bias": torch.ones(8)},
        optimizer=optimizer(),
        epoch=799,
        scaler={},
        args=argparse.Namespace(lr=1e-3, device="cuda", input_size=224, path=pathlib.Path("x")),
    ),
    "DINO": lambda x: dict(
        student=prefixed("module.backbone.", {k: 0 * v for k, v in x.items()}),
        teacher=prefixed("backbone.", x) | {"head.mlp.0.weight": torch.ones(2, 2)},
        optimizer=optimizer(),
        args=argparse.Namespace(arch="vit_small"),
        dino_loss=collections.OrderedDict(center=torch.zeros(1, 4)),
    ),
    "MSN": lambda x: dict(
        encoder=prefixed("module.", {k: 0 * v for k, v in x.items()}),
        target_encoder=prefixed("module.", x) | {"module.fc.fc1.weight": torch.ones(2, 2)},
        prototypes=torch.ones(4, 2),
        opt=optimizer(),
    ),
    "timm": lambda x: dict(
        arch="vit",
        state_dict={k: 0 * v for k, v in x.items()},
        state_dict_ema=x | {"head.weight": torch.ones(3, 64)},
        args=argparse.Namespace(lr=1e-3),
        metric=np.float64(71.3),
    ),
    "BEiT": lambda x: dict(
        model={k: 0 * v for k, v in x.items()}, model_ema=x, args=argparse.Namespace()
    ),
    "MoCo": lambda x: dict(
        epoch=300,
        state_dict=prefixed("module.base_encoder.", x)
        | prefixed("module.momentum_encoder.", {k: 0 * v for k, v in x.items()}),
    ),
    "Lightning": lambda x: {
        "state_dict": prefixed("model._orig_mod.", x),
        "hyper_parameters": collections.defaultdict(list, lr=[1e-3]),
        "callbacks": {"ModelCheckpoint{}": {"best": np.float32(0.5), "when": STARTED}},
        "pytorch-lightning_version": "2.4.0",
    },
    "solo-learn": lambda x: dict(
        state_dict=prefixed("backbone.", x)
        | prefixed("momentum_backbone.", {k: 0 * v for k, v in x.items()})
        | prefixed("projector.", {"0.weight": torch.ones(2, 2)})
    ),
    "averaged": lambda x: prefixed("module.", x) | {"n_averaged": torch.tensor(3)},
    "numpy": lambda x: dict(
        model=x,
        best=np.int64(3),
        done=np.bool_(True),
        rng=np.random.get_state(),
        kind=np.dtype("float32"),
        rest=[np.float32(1.5), torch.torch_version.TorchVersion("2.6"), types.SimpleNamespace(a=1)],
    ),
}
STARTED = datetime.datetime(2024, 1, 1)
PREFIXES = (
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "backbone.",
    "encoder.",
    "trunk.",
    "module.encoder_q.",
    "base_encoder.",
    "vit.",
    "visual.",
    "model.visual.trunk.",
)
PARTS = ("state_dict_ema", "model_ema", "ema", "student", "teacher", "target_encoder", "net")


def assert_same_weights(encoder, state):
    own = encoder.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[name], x) for name, x in state.items())


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_trainers_files_are_read(layout, legacy, plain, tmp_path):
    state = plain.state_dict()
    path = tmp_path / "file.pth"
    torch.save(LAYOUTS[layout](state), path, _use_new_zipfile_serialization=not legacy)
    encoder = linear_eval.load_encoder(path)
    assert_same_weights(encoder, state)
    assert encoder.options["script"] == ("mae" if layout == "MAE" else "msn")


def test_prefixes_and_parts_are_found(plain, tmp_path, capsys):
    state = plain.state_dict()
    for prefix in PREFIXES:
        assert_same_weights(load(prefixed(prefix, state), tmp_path), state)
        assert f"from {prefix[:-1]}" in capsys.readouterr().out
    for part in PARTS:
        assert_same_weights(load({part: prefixed("module.", state)}, tmp_path), state)
    for better, worse in (("teacher", "student"), ("model_ema", "model"), ("model", "student")):
        wrong = {name: 0 * x for name, x in state.items()}
        assert_same_weights(load({worse: wrong, better: state}, tmp_path), state)
    twice = refused(dict(left=state, right=state), tmp_path, capsys)
    assert "several networks (left., right.)" in twice
    resnet = models.resnet18().state_dict()
    moco = prefixed("module.encoder_q.", resnet) | prefixed("module.encoder_k.", resnet)
    moco["module.queue"] = torch.ones(2, 2)
    load({"state_dict": moco}, tmp_path)
    assert "resnet18: images of 224 x 224" in (line := capsys.readouterr().out)
    assert "from state_dict.module.encoder_q" in line


def test_numbers_of_an_older_numpy(plain, tmp_path):
    state = plain.state_dict()
    path = tmp_path / "file.pth"
    saved = dict(model=state, best=np.float64(3), rng=np.arange(3))
    torch.save(saved, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    old = content.replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray")
    assert old != content or b"cnumpy.core.multiarray" in content
    path.write_bytes(old)
    assert_same_weights(linear_eval.load_encoder(path), state)


def test_other_libraries_need_not_be_there(plain, tmp_path, monkeypatch):
    """Their dictionaries and objects, pickled here by modules that are gone when they are read."""
    state = plain.state_dict()
    for module, name in (("omegaconf.dictconfig", "DictConfig"), ("easydict", "EasyDict")):
        base = dict if name == "EasyDict" else object
        kind = type(name, (base,), dict(__module__=module))
        with monkeypatch.context() as patch:
            for part in (module.split(".")[0], module):
                patch.setitem(sys.modules, part, types.ModuleType(part))
            setattr(sys.modules[module], name, kind)
            config = kind()
            config.lr = 0.1
            if base is dict:
                config["lr"] = 0.1
            torch.save(dict(model=state, cfg=config), tmp_path / "file.pth")
        assert_same_weights(linear_eval.load_encoder(tmp_path / "file.pth"), state)


def test_safetensors_are_read_without_their_library(plain, tmp_path, monkeypatch, capsys):
    from safetensors.torch import save_file

    state = {name: x.contiguous() for name, x in plain.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata=dict(format="pt"))
    halves = prefixed("vit.", {name: x.half() for name, x in state.items()})
    save_file(halves | {"steps": torch.tensor(3)}, tmp_path / "halves.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert_same_weights(linear_eval.load_encoder(tmp_path / "model.safetensors"), state)
    encoder = linear_eval.load_encoder(tmp_path / "halves.safetensors")
    assert_same_weights(encoder, {name: x.half().float() for name, x in state.items()})
    whole = (tmp_path / "model.safetensors").read_bytes()
    for size in (4, 100, len(whole) - 10):
        (tmp_path / "cut.safetensors").write_bytes(whole[:size])
        assert "damaged" in refusal(tmp_path / "cut.safetensors", capsys)


# ---- What is refused


class Evil:
    def __init__(self, argument, how):
        self.argument = argument
        self.how = how

    def __reduce__(self):
        return self.how, (self.argument,)


def run_code(text):
    raise AssertionError("a file was run")


@pytest.mark.parametrize(
    "how, name",
    [
        (os.mkdir, "(posix|nt).mkdir"),
        (os.makedirs, "os.makedirs"),
        (run_code, "test_released_files.run_code"),
        (eval, "eval"),
        (exec, "exec"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_is_refused_and_not_run(how, name, legacy, plain, tmp_path, capsys):
    made = tmp_path / "made"
    argument = f"__import__('os').mkdir({str(made)!r})" if how in (eval, exec) else str(made)
    state = dict(model=plain.state_dict(), evil=Evil(argument, how))
    torch.save(state, tmp_path / "evil.pth", _use_new_zipfile_serialization=not legacy)
    message = refusal(tmp_path / "evil.pth", capsys)
    assert re.search(rf"holds more than weights \(\S*{name}\)", message)
    assert "torch.save(model.state_dict(), FILE)" in message
    assert not made.exists()


def test_whole_networks_scripts_and_other_files_are_refused(plain, tmp_path, capsys):
    torch.save(plain, tmp_path / "whole.pth")
    message = refusal(tmp_path / "whole.pth", capsys)
    assert "more than weights (timm.models.vision_transformer.VisionTransformer)" in message
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / "script.pt")
    assert "TorchScript" in refusal(tmp_path / "script.pt", capsys)
    torch.save(plain.state_dict(), tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    torch.save(plain.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    old = (tmp_path / "old.pth").read_bytes()
    damaged = dict(
        cut=whole[: len(whole) // 2],
        end=whole[:-5],
        start=whole[:20],
        empty=b"",
        old=old[: len(old) // 2],
        old_start=old[:40],
        text=b"version https://git-lfs.github.com/spec/v1\n",
        pickle=pickle.dumps(dict(a=1)),
        json=json.dumps(dict(a=1)).encode(),
    )
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        assert "damaged or foreign" in refusal(tmp_path / name, capsys), name


def test_files_without_an_encoder_say_what_they_have(plain, tmp_path, capsys):
    for state in ({}, {"model": 1}, [1, 2], torch.ones(3), None, {1: {2: 3}}):
        assert "no tensors" in refused(state, tmp_path, capsys)
    own = linear_eval.small_network([3, 8]).state_dict()
    message = refused(own, tmp_path, capsys)
    assert "patch_embed.proj.weight" in message and "conv1.weight" in message
    assert "it has 0.weight, 1.weight" in message
    huggingface = {"vit.embeddings.patch_embeddings.projection.weight": torch.ones(8, 3, 4, 4)}
    assert "vit.embeddings.patch_embeddings" in refused(huggingface, tmp_path, capsys)
    state = dict(plain.state_dict())
    del state["blocks.1.mlp.fc2.bias"]
    assert "blocks.1.mlp.fc2.bias missing" in refused(state, tmp_path, capsys)


def test_a_protocol_needs_its_features(tmp_path, capsys):
    torch.save(vit(class_token=False, global_pool="avg").state_dict(), tmp_path / "no_cls.pth")
    with pytest.raises(SystemExit):
        linear_eval.main([str(tmp_path / "no_cls.pth"), *DATA, "--protocol", "msn"])
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "reads raw or pooled, this network has patches" in message
