"""Words and pictures of the tiny reader: a tokenizer of whole words, and the stock processors of Qwen2-VL."""

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from multimodal.tiny_reader.scenes import BACKGROUNDS, COLOURS, COLUMNS, ROWS, SHAPES

PATCH, MERGE = 4, 2
CELL = PATCH * MERGE  # pixels a visual token covers on each side
COARSE_CELLS = 36  # the whole scene at 48 x 48 pixels
PAD, UNKNOWN, START, END = "<|endoftext|>", "<|unknown|>", "<|im_start|>", "<|im_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
SPECIAL = (PAD, UNKNOWN, START, END, "<|vision_start|>", "<|vision_end|>", IMAGE, VIDEO)
TENS = tuple("0123456789")  # the first digit of a code
UNITS = tuple("##" + digit for digit in TENS)  # any later one, as WordPiece marks what continues a word
ASKING = ("system", "user", "assistant", "what", "is", "the", "code", "at", "shape", "background", "where", "?", ".")
WORDS = (*SPECIAL, "\n", *ASKING, *COLOURS, *SHAPES, *BACKGROUNDS, *ROWS, *COLUMNS, *TENS, *UNITS)
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif part.type == 'text' %}"
    "{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What the format makes of one picture and a question.
CHAT_QUESTION = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
)
LABEL_WORDS = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "tens": TENS,
    "units": UNITS,
    "row": ROWS,
    "column": COLUMNS,
}
LABEL_IDS = {name: tuple(WORDS.index(word) for word in words) for name, words in LABEL_WORDS.items()}
BACKGROUND_IDS = tuple(WORDS.index(word) for word in BACKGROUNDS)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word of `WORDS`, in small or capital letters; a code of two digits is two tokens."""
    words = {word: index for index, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordPiece(words, unk_token=UNKNOWN, max_input_chars_per_word=100))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), "removed", invert=True)
    inner.decoder = decoders.WordPiece("##", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token=UNKNOWN,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[START, *SPECIAL[4:]],
        padding_side="left",
        model_max_length=4096,
    )


def build_processor() -> Qwen2_5_VLProcessor:
    """Qwen2.5-VL's processor with this tokenizer; pictures are brought to 36 visual tokens, the coarse view."""
    pixels = COARSE_CELLS * CELL**2
    settings = {
        "patch_size": PATCH,
        "merge_size": MERGE,
        "size": {"shortest_edge": pixels, "longest_edge": pixels},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(**settings),
        tokenizer=build_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(patch_size=PATCH, merge_size=MERGE),
        chat_template=CHAT,
    )
