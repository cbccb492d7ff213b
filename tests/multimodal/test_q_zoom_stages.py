"""Q-Zoom's stages around a small untrained reader: what they train, run, keep and leave, and exact resume."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import PreTrainedModel

from multimodal.q_zoom import QZoom
from multimodal.q_zoom.training.loading import load_zoom
from multimodal.q_zoom.training.prompts import answer_ids, prompts_of
from multimodal.q_zoom.training.sample_data import FolderData
from multimodal.q_zoom.training.samples import ZoomSample, write_samples
from multimodal.q_zoom.training.stages import GateTraining, RegionProposalTraining, region_scores
from multimodal.q_zoom.training.targeted_tuning import TargetedTuning, random_box
from multimodal.tiny_reader.model import TinyReaderConfig, TinyReaderForConditionalGeneration
from multimodal.tiny_reader.processing import WORDS, build_processor
from multimodal.tiny_reader.stage_data import scene_samples
from multimodal.training import main
from training_runs.command_line import StopAfterStep

CONFIGS = Path(__file__).parents[2] / "configs" / "multimodal"
SETTINGS = {
    "tap_layer": 2,
    "proposal_depth": 2,
    "gate_depth": 1,
    "sink": "none",
    "coarse_tokens": [36, 36],
    "region_tokens": [64, 64],
    "least_region_pixels": 8,
}


def untrained_reader() -> PreTrainedModel:
    word = {name: index for index, name in enumerate(WORDS)}
    text = {
        "vocab_size": len(WORDS),
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 4, 4]},
        "pad_token_id": word["<|endoftext|>"],
        "eos_token_id": word["<|im_end|>"],
        "bos_token_id": None,
        "tie_word_embeddings": True,
    }
    vision = {"depth": 1, "hidden_size": 48, "out_hidden_size": 48, "patch_size": 4, "spatial_merge_size": 2}
    special = {
        "image_token_id": word["<|image_pad|>"],
        "video_token_id": word["<|video_pad|>"],
        "vision_start_token_id": word["<|vision_start|>"],
        "vision_end_token_id": word["<|vision_end|>"],
    }
    torch.manual_seed(0)
    model = TinyReaderForConditionalGeneration(
        TinyReaderConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **special)
    )
    model.generation_config.eos_token_id = word["<|im_end|>"]
    model.generation_config.pad_token_id = word["<|endoftext|>"]
    return model.eval()


def peak_at_box(sample: ZoomSample) -> torch.Tensor:
    """A map that points at the cell in the middle of the sample's box."""
    grounding = torch.full((6, 6), 0.001)
    left, top, right, bottom = sample.box
    grounding[int((top + bottom) / 2 / 32), int((left + right) / 2 / 32)] = 0.2
    return grounding


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("reader"))
    untrained_reader().save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def samples() -> list[ZoomSample]:
    drawn = scene_samples(12, ("code", "shape"))
    return [
        sample.replace(grounding=peak_at_box(sample), tokens=36, zoom=index % 2) for index, sample in enumerate(drawn)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, samples) -> str:
    made = tmp_path_factory.mktemp("samples") / "train"
    write_samples(made, samples)
    return str(made)


STAGES = {"proposal": RegionProposalTraining, "gate": GateTraining, "tuning": TargetedTuning}


@pytest.mark.parametrize(
    ("stage", "trained"),
    [("proposal", ("zoom.proposal.",)), ("gate", ("zoom.gate.",)), ("tuning", ("zoom.model.lm_head", ".layers."))],
)
def test_a_stage_gives_gradients_to_what_it_trains_and_to_nothing_else(backbone, samples, stage, trained):
    module = STAGES[stage](backbone, None, SETTINGS)
    module.loss(samples[:4]).backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.requires_grad:
            # The reader's embeddings are its head as well.
            tied = stage == "tuning" and name == "zoom.model.model.language_model.embed_tokens.weight"
            assert tied or any(part in name for part in trained)
    assert not any(p.requires_grad for p in module.zoom.model.model.visual.parameters())


@pytest.mark.parametrize("stage", ["proposal", "gate"])
def test_layers_after_the_tap_are_not_run(backbone, samples, stage):
    module = STAGES[stage](backbone, None, SETTINGS)

    def refuse(*_):
        raise AssertionError("a layer after the tap ran")

    for layer in module.zoom.adapter.decoder.layers[2:]:
        layer.register_forward_pre_hook(refuse)
    assert module.loss(samples[:2]) > 0
    with torch.no_grad():
        module.scores(samples[:2])


@pytest.mark.parametrize("stage", ["proposal", "gate"])
def test_remembered_rows_give_the_same_loss_and_are_read_once(backbone, samples, stage, monkeypatch):
    plain, remembering = (STAGES[stage](backbone, None, SETTINGS, remember=remember) for remember in (False, True))
    remembering.zoom.load_state_dict(plain.zoom.state_dict())
    for _ in range(2):
        torch.testing.assert_close(remembering.loss(samples[:4]), plain.loss(samples[:4]))
        monkeypatch.setattr(
            remembering.zoom.adapter, "prompts", lambda inputs: pytest.fail("the frozen layers ran again")
        )


@pytest.mark.parametrize("stage", ["proposal", "gate"])
@pytest.mark.parametrize(("in_memory", "workers"), [(False, 0), (True, 1), (True, 0)])
def test_only_samples_that_stay_are_remembered(backbone, folder, stage, in_memory, workers):
    """Others are new objects in every epoch, and what is kept of them would grow."""
    module = STAGES[stage](backbone, None, SETTINGS, remember=True)
    data = FolderData(folder, folder, in_memory, batch_size=4, num_workers=workers)
    if data.keeps_samples:
        quiet_trainer().validate(module, datamodule=data, verbose=False)
        assert len(module.rows._made) == 12
        return
    with pytest.raises(ValueError, match="remember is True, but FolderData"):
        quiet_trainer().validate(module, datamodule=data, verbose=False)
    module.remember = False
    module.setup("validate")


def quiet_trainer() -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(accelerator="cpu", devices=1, **quiet)


def test_measures_of_boxes_are_means_over_samples_that_have_one(backbone, samples, tmp_path):
    module = RegionProposalTraining(backbone, None, {**SETTINGS, "region_threshold": 0.5})
    with torch.no_grad():
        maps = module._maps(samples[:8])
    boxed = (0, 3, 4, 5)  # one, three and none of a batch
    mixed = [sample if index in boxed else sample.replace(box=None) for index, sample in enumerate(samples[:8])]
    write_samples(tmp_path / "mixed", mixed)
    quiet, asked = quiet_trainer(), str(tmp_path / "mixed")
    quiet.validate(module, datamodule=FolderData(asked, asked, evaluation_batch_size=3), verbose=False)
    each = [region_scores(module.zoom, mixed[index], maps[index]) for index in boxed]
    for name in ("hit", "inside", "area"):
        expected = sum(one[name] for one in each) / 4
        assert float(quiet.callback_metrics[f"val/{name}"]) == pytest.approx(expected, rel=1e-4), name
    assert len({one["inside"] for one in each}) > 1


@pytest.mark.parametrize("stage", [*STAGES])
def test_every_validation_batch_logs_the_same(backbone, samples, stage, monkeypatch):
    """Processes wait for each other at every name that is logged."""
    module, logged = STAGES[stage](backbone, None, SETTINGS), []
    monkeypatch.setattr(module, "log", lambda name, value, **options: logged.append((name, options["batch_size"])))
    named = []
    for batch in (samples[:2], [samples[0].replace(box=None)], []):
        logged.clear()
        module.validation_step(batch, 0)
        named.append([name for name, _ in logged])
        assert ("val/loss", len(batch)) in logged
    assert named[0] == named[1] == named[2] == [f"val/{name}" for name in module.measures]


def test_a_layer_that_gate_and_proposal_share_stays_with_the_proposal(backbone, samples):
    module = GateTraining(backbone, None, {**SETTINGS, "gate_depth": 2, "share_first_layer": True})
    module.loss(samples[:2]).backward()
    assert all(parameter.grad is None for parameter in module.zoom.proposal.parameters())
    assert all(parameter.grad is not None for parameter in module.zoom.gate.layers[1].parameters())


def test_tuning_asks_for_regions_as_they_are_asked_for_in_use(backbone, samples):
    """The query is the question's last token; the published code for Qwen2.5-VL takes the last of the answer."""
    module = TargetedTuning(backbone, None, {**SETTINGS, "region_threshold": 0.4})
    for sample, prompt in zip(samples[:3], prompts_of(module.zoom, samples[:3]), strict=True):
        proposed = module.zoom.propose(sample.image, sample.question)
        boxes, cells = module.regions(sample, prompt, sample.picture(), None)
        assert boxes == proposed.boxes
        assert cells == proposed.cells
        assert boxes
        fused = module.with_region(sample, prompt, None)
        assert int(fused.visual.sum()) > 36
        assert fused.input_ids[-1] == prompt.input_ids[-1]


def test_boxes_of_tuning(backbone, samples):
    module = TargetedTuning(backbone, None, {**SETTINGS, "region_threshold": 1.0}, use_boxes=True, random_boxes=1.0)
    (prompt,) = prompts_of(module.zoom, samples[:1])
    asked = (samples[0], prompt, samples[0].picture())
    assert module.regions(*asked, None)[0] == [samples[0].box]
    drawn = [module.regions(*asked, torch.Generator().manual_seed(seed))[1][0] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    module.use_boxes = False
    assert module.with_region(samples[0], prompt, None) is prompt  # nothing is above a threshold of 1


def test_random_boxes_lie_within_the_map_and_have_the_published_sides():
    generator = torch.Generator().manual_seed(0)
    boxes = [random_box((20, 30), generator) for _ in range(300)]
    assert all(0 <= box.left < box.right <= 30 and 0 <= box.top < box.bottom <= 20 for box in boxes)
    assert {box.width for box in boxes} == set(range(3, 19))
    assert {box.height for box in boxes} == set(range(2, 13))


def test_answers_end_as_the_chat_format_ends_them(backbone):
    adapter = load_zoom(backbone, None, SETTINGS).adapter
    ids = answer_ids(adapter, "What is the code at red?", "42")
    assert adapter.processor.tokenizer.convert_ids_to_tokens(ids.tolist()) == ["4", "##2", "<|im_end|>", "\n"]
    with pytest.raises(ValueError, match="answer to 'What'"):
        answer_ids(adapter, "What", " ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0}, "learning_rate is 0"),
        ({"warmup": 1.0}, "warmup is 1.0"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] is 1.0"),
        ({"weight_decay": -1}, "weight_decay is -1"),
        ({"settings": "qwen"}, "settings is 'qwen'"),
        ({"settings": None}, "settings is None"),
        ({"settings": {"tap": 2}}, "unknown: \\['tap'\\]"),
        ({"settings": {"tap_layer": 4}}, "tap_layer is 4"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings_are_refused(backbone, changes, message):
    with pytest.raises(ValueError, match=message):
        RegionProposalTraining(**{"backbone": backbone, "settings": SETTINGS, **changes})


def test_samples_must_carry_what_a_stage_learns_from(backbone, samples):
    with pytest.raises(ValueError, match="has no grounding"):
        RegionProposalTraining(backbone, None, SETTINGS).loss([samples[0].replace(grounding=None)])


def fit(stage: str, backbone: str, folder: str, runs: Path, *flags: str) -> None:
    kind = STAGES[stage]
    settings = {
        "model": {
            "class_path": f"{kind.__module__}.{kind.__name__}",
            "init_args": {"backbone": backbone, "settings": SETTINGS, "learning_rate": 1e-3},
        },
        "data": {
            "class_path": "multimodal.q_zoom.training.sample_data.FolderData",
            "init_args": {"folder": folder, "validation_folder": folder, "batch_size": 4},
        },
        "trainer": {"max_epochs": 2, "gradient_clip_val": 1.0, "log_every_n_steps": 1},
    }
    if stage == "tuning":
        settings["model"]["init_args"]["random_boxes"] = 0.5
    config = runs.parent / f"{stage}.yaml"
    config.write_text(yaml.safe_dump(settings))
    quiet = ("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false")
    main(["fit", "--config", str(config), "--runs", str(runs), *quiet, *flags])


def interrupt_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ctrl-C within the step."""
    end = StopAfterStep.on_train_batch_end

    def asked(self, trainer, *arguments):
        self.asked = trainer.global_step == step
        end(self, trainer, *arguments)

    monkeypatch.setattr(StopAfterStep, "on_train_batch_end", asked)


@pytest.mark.parametrize("stage", [*STAGES])
def test_a_run_resumed_in_mid_epoch_ends_as_one_that_was_not(stage, backbone, folder, tmp_path, monkeypatch):
    fit(stage, backbone, folder, tmp_path / "whole")
    with monkeypatch.context() as patched:
        interrupt_after(4, patched)
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            fit(stage, backbone, folder, tmp_path / "halves")
    assert not (tmp_path / "halves" / stage / "0" / "branches").exists()
    fit(stage, backbone, folder, tmp_path / "halves", "--ckpt_path", "last")
    whole, resumed = tmp_path / "whole" / stage / "0", tmp_path / "halves" / stage / "1"
    files = ["branches/q_zoom_heads.safetensors", *(["model/model.safetensors"] if stage == "tuning" else [])]
    for file in files:
        first, second = load_file(whole / file), load_file(resumed / file)
        assert first.keys() == second.keys()
        assert all(first[name].equal(second[name]) for name in first), file
    checkpoint = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 6
    assert not [name for name in checkpoint["state_dict"] if "visual" in name or "language_model.norm" in name]
    made = QZoom.from_pretrained(str(whole / "model") if stage == "tuning" else backbone, heads=str(whole / "best"))
    assert made.config.tap_layer == 2


def test_training_lowers_the_loss_and_branches_go_on_into_the_next_stage(backbone, samples, tmp_path):
    module = RegionProposalTraining(backbone, None, SETTINGS, remember=True)
    optimizer = torch.optim.AdamW(module.zoom.proposal.parameters(), 3e-3)
    before = module.scores(samples)
    for _ in range(60):
        optimizer.zero_grad()
        module.loss(samples).backward()
        optimizer.step()
    after = module.scores(samples)
    assert after["loss"].value < 0.3 * before["loss"].value
    assert after["hit"].value > before["hit"].value
    assert after["labelled"] == (1, len(samples))
    module.zoom.save_pretrained(str(tmp_path / "heads"))
    again = RegionProposalTraining(backbone, str(tmp_path / "heads"))
    torch.testing.assert_close(again.scores(samples)["loss"].value, after["loss"].value)
    assert GateTraining(backbone, str(tmp_path / "heads")).zoom.config == module.zoom.config


def test_a_checkpoint_of_another_stage_is_refused(backbone):
    gate, proposal = GateTraining(backbone, None, SETTINGS), RegionProposalTraining(backbone, None, SETTINGS)
    checkpoint = {"state_dict": gate.state_dict()}
    gate.on_save_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="not of this stage"):
        proposal.on_load_checkpoint(checkpoint)


def test_an_argument_that_is_wrong_is_all_that_is_said():
    with pytest.raises(ValueError, match=r"^nowhere/q_zoom\.json holds no settings"):
        main(["fit", "--config", str(CONFIGS / "tiny_stage3.yaml"), "--model.init_args.heads", "nowhere"])


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("tiny_stage*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_can_be_parsed(config, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(config), "--print_config"])
    assert stop.value.code in (0, None)
    assert yaml.safe_load(capsys.readouterr().out)["model"]["class_path"].startswith("multimodal.q_zoom.training")
