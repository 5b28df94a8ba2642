"""linear_eval.load_encoder: files as trainers write them, against the networks of timm and
torchvision. Each is tiny; what cannot be read is refused in one line."""

import argparse
import copy
import functools
import json
import os
import pickle

import pytest
import timm
import torch
from torchvision import models

import linear_eval

VIT = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1)
BEIT = VIT | dict(use_abs_pos_emb=False, use_shared_rel_pos_bias=True, init_values=0.1)


def shaken(network):
    """In evaluation mode, no weight at its initial 0 or 1."""
    torch.manual_seed(0)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            noise = 0.1 * torch.randn_like(tensor)
            tensor.add_(noise.abs() if "running_var" in name else noise)
    return network.eval()


def vit(**options):
    return shaken(timm.models.VisionTransformer(**(VIT | dict(num_classes=0) | options)))


def prefixed(prefix, state):
    return {prefix + name: x for name, x in state.items()}


def zeros(state):
    return {name: 0 * x for name, x in state.items()}


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
    printed = capsys.readouterr()
    message = printed.err
    assert error.value.code == 2 and message.count("\n") == 1 and len(message) < 500, message
    assert str(path) in message and "give" in message and printed.out == ""
    assert "\x1b" not in message and "weights_only" not in message
    return message


def refused(state, tmp_path, capsys, **options):
    torch.save(state, tmp_path / "refused.pth")
    return refusal(tmp_path / "refused.pth", capsys, **options)


def assert_equals_timm(encoder, theirs):
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    found = linear_eval.features(encoder, images)
    assert found.keys() == {"cls", "cls4", "patches"}
    x = linear_eval.normalise(images.float() / 255, False)
    with torch.no_grad():
        tokens = theirs.forward_features(x)
    torch.testing.assert_close(found["cls"], tokens[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["patches"], tokens[:, 1:].mean(dim=1), rtol=1e-5, atol=1e-5)
    other = linear_eval.features(linear_eval.untrained(encoder), images)
    assert {k: x.shape for k, x in other.items()} == {k: x.shape for k, x in found.items()}
    assert not any(torch.equal(other[name], x) for name, x in found.items())


# ---- Networks
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(init_values=0.1),
        dict(patch_size=16),
        dict(embed_dim=192, num_heads=3),
        dict(embed_dim=1280, num_heads=16, depth=1),
    ],
    ids=str,
)
def test_a_vit_gives_timms_features(options, tmp_path):
    theirs = vit(**options)
    assert_equals_timm(load(theirs.state_dict(), tmp_path), theirs)


def test_a_data2vec_gives_timms_features(tmp_path):
    theirs = shaken(timm.models.beit.Beit(**BEIT, num_classes=0, global_pool="token"))
    state = theirs.state_dict() | {"mask_token": torch.ones(1, 1, 64)}
    state["lm_head.bias"] = torch.ones(64)
    state["rel_pos_bias.relative_position_index"] = torch.ones(17, 17, dtype=torch.long)
    encoder = load({"model": state}, tmp_path)
    assert encoder.options["script"] == "data2vec" and encoder.step is None
    assert_equals_timm(encoder, theirs)


@functools.cache
def shaken_resnet(arch):
    return shaken(dict(resnet18=models.resnet18, resnet50=models.resnet50)[arch]())


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("prefix", ["", "module.backbone."])
def test_a_resnet_gives_torchvisions_features(arch, prefix, tmp_path):
    theirs = copy.deepcopy(shaken_resnet(arch))
    state = prefixed(prefix, theirs.state_dict())
    if prefix:  # VICReg's own checkpoint
        state = {"model": state | {"module.projector.0.weight": torch.ones(2, 2)}, "epoch": 9}
    theirs.fc = torch.nn.Identity()
    encoder = load(state, tmp_path)
    assert encoder.options["image_size"] == 224
    images = torch.randint(256, (2, 3, 96, 96), dtype=torch.uint8)
    with torch.no_grad():
        expected = theirs(linear_eval.normalise(images.float() / 255, False))
    found = linear_eval.features(encoder, images)["pooled"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_heads_and_pixels_are_said_and_can_be_given(tmp_path, capsys):
    theirs = vit(embed_dim=384, num_heads=12)
    state = theirs.state_dict()
    assert load(state, tmp_path).options["heads"] == 6
    line = capsys.readouterr().out
    for part in ("dim 384", "patch_size 8", "depth 2", "heads 6", "image_size 32", "standardise"):
        assert part in line
    assert_equals_timm(load(state, tmp_path, heads=12), theirs)
    encoder = load(state, tmp_path, heads=12, plain_pixels=True)
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = theirs.forward_features(images / 255)[:, 0]
    found = linear_eval.features(encoder, images)["cls"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert "no multiple of 64: give its --heads" in refused(
        vit(embed_dim=96).state_dict(), tmp_path, capsys
    )
    assert "no multiple of 7: give its --heads" in refused(state, tmp_path, capsys, heads=7)


@pytest.mark.parametrize(
    "network, words",
    [
        (lambda: vit(img_size=(32, 64)), "size mismatch for pos_embed"),
        (lambda: vit(pos_embed="none"), "pos_embed"),
        (lambda: vit(qk_norm=True), "blocks.0.attn.q_norm.weight"),
        (lambda: vit(reg_tokens=4), "reg_token"),
        (lambda: vit(global_pool="avg", fc_norm=True), "fc_norm.weight"),
        (lambda: vit(class_token=False, global_pool="avg"), "cls_token"),
        (lambda: vit(mlp_ratio=3), "size mismatch for blocks.0.mlp.fc1.weight"),
        (lambda: vit(in_chans=1), "size mismatch for patch_embed.proj.weight"),
        (lambda: timm.models.beit.Beit(**VIT, use_abs_pos_emb=False), "pos_embed"),
        (lambda: timm.create_model("convnext_atto"), "it has stem.0.weight"),
        (lambda: models.resnet34(), "layer1.2.conv1.weight"),
        (lambda: models.ResNet(models.resnet.Bottleneck, [3, 4, 6, 3], width_per_group=8), "layer"),
        (lambda: torch.nn.Sequential(*models.resnet18().children()), "it has 0.weight, 1.weight"),
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
        args=argparse.Namespace(lr=1e-3, device="cuda", input_size=224),
    ),
    "DINO": lambda x: dict(
        student=prefixed("module.backbone.", zeros(x)),
        teacher=prefixed("backbone.", x) | {"head.mlp.0.weight": torch.ones(2, 2)},
        optimizer=optimizer(),
        args=argparse.Namespace(arch="vit_small"),
        dino_loss=dict(center=torch.zeros(1, 4)),
    ),
    "MSN": lambda x: dict(
        encoder=prefixed("module.", zeros(x)),
        target_encoder=prefixed("module.", x) | {"module.fc.fc1.weight": torch.ones(2, 2)},
        prototypes=torch.ones(4, 2),
        opt=optimizer(),
    ),
    "timm": lambda x: dict(
        arch="vit",
        state_dict=zeros(x),
        state_dict_ema=x | {"head.weight": torch.ones(3, 64)},
        args=argparse.Namespace(lr=1e-3),
    ),
    "BEiT": lambda x: dict(model=zeros(x), model_ema=x, args=argparse.Namespace()),
    "Lightning": lambda x: {
        "state_dict": prefixed("model._orig_mod.", x),
        "pytorch-lightning_version": "2.4.0",
    },
    "averaged": lambda x: prefixed("module.", x) | {"n_averaged": torch.tensor(3)},
}
PREFIXES = ("module.", "_orig_mod.", "_orig_mod.module.", "backbone.", "module.encoder.", "vit.")
INSIDE = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module")


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
    kept = torch.equal(linear_eval.untrained(encoder).pos_embed, encoder.pos_embed)
    assert kept == (layout == "MAE")  # its positions are fixed


def test_prefixes_and_wrappers_are_stripped(plain, tmp_path, capsys):
    state = plain.state_dict()
    for prefix in PREFIXES:
        assert_same_weights(load(prefixed(prefix, state), tmp_path), state)
    for word in INSIDE:
        wrapped = {}
        for name, x in state.items():
            first, _, rest = name.partition(".norm1.")
            wrapped[f"{first}.{word}.norm1.{rest}" if rest else name] = x
        assert wrapped.keys() != state.keys()
        assert_same_weights(load(prefixed("module.", wrapped), tmp_path), state)
    both = prefixed("left.", state) | prefixed("right.", state)
    assert "it has left., right." in refused(both, tmp_path, capsys)


# ---- What is refused
class Evil:
    def __init__(self, argument, how):
        self.argument = argument
        self.how = how

    def __reduce__(self):
        return self.how, (self.argument,)


def run_code(text):
    raise AssertionError("a file was run")


@pytest.mark.parametrize("how", [os.mkdir, run_code, eval])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_is_refused_and_not_run(how, legacy, plain, tmp_path, capsys):
    made = tmp_path / "made"
    argument = f"__import__('os').mkdir({str(made)!r})" if how is eval else str(made)
    state = dict(model=plain.state_dict(), evil=Evil(argument, how))
    torch.save(state, tmp_path / "evil.pth", _use_new_zipfile_serialization=not legacy)
    message = refusal(tmp_path / "evil.pth", capsys)
    assert "holds more than weights (UnpicklingError)" in message
    assert "torch.save(model.state_dict(), FILE)" in message
    assert not made.exists()


def test_whole_networks_and_damaged_files_are_refused(plain, tmp_path, capsys):
    torch.save(plain, tmp_path / "network.pth")
    assert "more than weights" in refusal(tmp_path / "network.pth", capsys)
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
        assert "damaged" in refusal(tmp_path / name, capsys), name


def test_files_without_an_encoder_say_what_they_have(plain, tmp_path, capsys):
    for state in ({}, {"model": 1}, [1, 2], torch.ones(3), None, {1: {2: 3}}):
        assert "no encoder that is built here" in refused(state, tmp_path, capsys)
    huggingface = {"vit.embeddings.patch_embeddings.projection.weight": torch.ones(8, 3, 4, 4)}
    message = refused(huggingface, tmp_path, capsys)
    assert "patch_embed.proj.weight" in message and "vit.embeddings.patch_embeddings" in message
    state = dict(plain.state_dict())
    del state["blocks.1.mlp.fc2.bias"]
    assert 'Missing key(s) in state_dict: "blocks.1.mlp.fc2.bias"' in refused(
        state, tmp_path, capsys
    )


def test_a_released_file_is_evaluated_on_given_data(plain, pictures, tmp_path, capsys):
    torch.save(plain.state_dict(), tmp_path / "vit.pth")
    options = [str(tmp_path / "vit.pth"), "--epochs", "2", "--workers", "0"]
    with pytest.raises(SystemExit):
        linear_eval.main(options)
    assert "--data: needed" in capsys.readouterr().err
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        (tmp_path / "data" / split).symlink_to(pictures / "train")
    linear_eval.main([*options, "--data", str(tmp_path / "data")])
    report = json.loads((tmp_path / "linear_eval_vit_data_class.json").read_text())
    assert report["step"] is None and len(report["untrained_heads"]) == 18
    assert report["class_sizes"] == [15] * 4 and report["training_images"] == 54
