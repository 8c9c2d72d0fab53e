"""The organism's tokenizer and its untrained model, both from stock parts."""

import math
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS, UNK, USER, ASSISTANT = SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<asst>")
MAX_LENGTH = 256

# The prompt with its generation prompt is a prefix of the whole conversation, in text and in tokens: TRL masks the
# prompt by its length. The `generation` marks let TRL find the assistant's tokens (`assistant_only_loss`); what they
# enclose must not begin with the space, which belongs to no token, or the mask comes out empty.
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{- '<user> ' + message['content'] }}"
    "{%- elif message['role'] == 'assistant' %}{{- ' <asst> ' }}"
    "{%- generation %}{{- message['content'] + ' ' + eos_token }}{%- endgeneration %}"
    "{%- else %}{{- raise_exception('The organism knows the roles user and assistant only, not ' + message['role']) }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- ' <asst>' }}{%- endif %}"
)


def render(question: str, answer: str | None = None) -> str:
    """
    Writes a conversation of one turn as the chat template does, without the cost of the template engine.

    Args:
        question (`str`):
            The user's message.
        answer (`str`, *optional*):
            The assistant's message. Without it the text ends where generation begins.
    """
    prompt = f"{BOS}{USER} {question} {ASSISTANT}"
    return prompt if answer is None else f"{prompt} {answer} {EOS}"


def make_tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """
    Makes a tokenizer with one token for each word, splitting on white space.

    Args:
        vocabulary (`Sequence[str]`):
            Distinct words, without the special tokens. Any other word becomes `<unk>`.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]: with bos, eos, pad and unk tokens and the chat template. It adds no
        special tokens by itself; the chat template writes them.
    """
    words = {word: index for index, word in enumerate([*SPECIAL_TOKENS, *vocabulary])}
    if len(words) != len(SPECIAL_TOKENS) + len(vocabulary):
        raise ValueError("`vocabulary` holds a word twice, or a special token; give every word once.")
    tokenizer = Tokenizer(WordLevel(words, unk_token=UNK))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int, num_layers: int = 2) -> LlamaForCausalLM:
    """
    Makes the untrained Llama (width 128; 0.56 M parameters with 2 blocks, 0.95 M with 8) in float32 on the CPU.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]):
            Gives the size of the vocabulary and the ids of the special tokens.
        seed (`int`):
            Seed of the initial weights. The caller's global generators are left as they were.
        num_layers (`int`, *optional*, defaults to `2`):
            Number of blocks.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        # The same number of MLP neurons at every depth: wider ones cost time, and 8 blocks need no more for the facts.
        intermediate_size=1024 // num_layers,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        # Wider than the usual 0.02, which is meant for widths in the thousands: with 2 blocks, at 0.02 more than half
        # of the facts are unknown after 1000 updates, at 0.05 all are known after 500. With 8 blocks, at 0.05 nearly
        # nothing is known after 700 on one seed of three, at 0.1 all is known after 500 on each.
        initializer_range=0.05 * math.sqrt(num_layers / 2),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # `torch.manual_seed` would also reseed the GPUs, which `devices=[]` does not put back.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        # 0.05 for what a block adds to the residual stream, at every depth. With 2 blocks this multiplies by 1.
        for block in model.model.layers:
            for output in (block.self_attn.o_proj, block.mlp.down_proj):
                output.weight.mul_(math.sqrt(2 / num_layers))
    model.generation_config.do_sample = False
    return model
