"""T-SAM one number at a time: the equations as they read, with no code of the product and no thought of speed.

One image at a time, in double precision. A matrix is a list of rows, a map a list of rows of positions; its numbers are
floats, or scalars of float64 tensors where a gradient is wanted. "Eq. (n)" is the paper's (arXiv:2411.15236).
"""

import copy
import math
from contextlib import ExitStack, contextmanager

import torch


SIGMA = 0.5  # App. B.2


def content(ids, bos, eos):
    """Positions of the prompt's own tokens: not <bos>, nothing from the first <eos> on."""
    end = ids.index(eos) if eos in ids else len(ids)
    return [position for position in range(end) if ids[position] != bos]


def symmetrized(attention):
    """T' of an encoder whose tokens see those behind them, as if they did not: tril((T' + T'ᵀ)/2). App. B.2."""
    tokens = range(len(attention))
    return [[(attention[i][j] + attention[j][i]) / 2 if j <= i else 0.0 for j in tokens] for i in tokens]


def parts(row):
    """Of the row's sum."""
    return [value / sum(row) for value in row]


def text_attention(attention, own, gamma):
    """T_ij = T'_ij^γ / Σ_{m<=i} T'_im^γ over content tokens, row i of i + 1 columns. Eq. (3), (14)."""
    return [parts([attention[i][j] ** gamma for j in own if j <= i]) for i in own]


def text_attention_in_logs(attention, own, gamma):
    """The same T where a power would leave even double precision."""
    logs = [[gamma * math.log(attention[i][j]) for j in own if j <= i] for i in own]
    return [parts([math.exp(log - max(row)) for log in row]) for row in logs]


def attainable(text):
    """T whose diagonal is the largest of its row, as S's is, each row divided by its sum."""
    return [parts([*row[:-1], max(row)]) for row in text]


def reflect(index, size):
    """Where a position one outside 0 .. size - 1 is found again, the border itself repeated only if it is all."""
    if size == 1:
        return 0
    return abs(index) if index < size else 2 * (size - 1) - index


def smooth(image):
    """One map (H, W) under the kernel exp(-(x² + y²) / (2σ)²), whose nine numbers sum to one. App. B.2."""
    height, width = len(image), len(image[0])
    kernel = {(y, x): math.exp(-(x * x + y * y) / (2 * SIGMA) ** 2) for y in (-1, 0, 1) for x in (-1, 0, 1)}
    total = sum(kernel.values())

    def blurred(h, w):
        taps = [k / total * image[reflect(h + y, height)][reflect(w + x, width)] for (y, x), k in kernel.items()]
        return sum(taps)

    return [[blurred(h, w) for w in range(width)] for h in range(height)]


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5


def similarity(images):
    """C of the content tokens' maps. Eq. (7)."""
    flat = [[value for row in smooth(image) for value in row] for image in images]
    return [[cosine(a, b) for b in flat] for a in flat]


def normalized(matrix):
    """S_ij = C_ij / Σ_k C_ik for j <= i; k <= i. Eq. (7)."""
    return [parts(row[: i + 1]) for i, row in enumerate(matrix)]


def loss(text, images, objective):
    """Σ_i (i/s) Σ_{j<=i} |T_ij - S_ij|, Eq. (14). "cosine", the release: Σ_r 0.2·r·(1 - cos(T_r, C_r)), r from 0.

    text: T; for "relation" and "contrast", which are further below, R.
    """
    if objective in ("relation", "contrast"):
        return contrast(text, images, objective)
    size, similar = len(text), similarity(images)
    if objective == "cosine":
        return sum(0.2 * r * (1 - cosine(text[r][:r], similar[r][:r])) for r in range(1, size))
    text, rows = attainable(text) if objective == "attainable" else text, normalized(similar)
    total = 0.0
    for i in range(1, size + 1):
        total = total + i / size * sum(abs(text[i - 1][j - 1] - rows[i - 1][j - 1]) for j in range(1, i + 1))
    return total


def covered(start, end, first):
    """How much of the position from `first` to `first + 1` lies between two places."""
    return max(0.0, min(end, first + 1) - max(start, first))


def box_on(box, height, width):
    """How much of each position lies in a box of fractions (x0, y0, x1, y1), rows of the grid."""
    x0, y0, x1, y1 = box
    across = [covered(x0 * width, x1 * width, w) for w in range(width)]
    down = [covered(y0 * height, y1 * height, h) for h in range(height)]
    return [[part * other for other in across] for part in down]


def mask_on(mask, height, width):
    """The mean of a mask (rows of numbers) over each position, of which it holds a whole number."""
    tall, wide = len(mask) // height, len(mask[0]) // width

    def mean(h, w):
        own = [value for row in mask[h * tall : (h + 1) * tall] for value in row[w * wide : (w + 1) * wide]]
        return sum(own) / len(own)

    return [[mean(h, w) for w in range(width)] for h in range(height)]


def share_inside(image, region):
    """Σ_a A_a R_a / Σ_a A_a of one map and one region on its grid."""
    inside = sum(value * part for row, own in zip(image, region) for value, part in zip(row, own))
    return inside / sum(value for row in image for value in row)


def layout(phrases):
    """mean over phrases (maps of its tokens, region) of mean over tokens of 1 - Σ_a A_a R_a / Σ_a A_a."""
    outside = [sum(1 - share_inside(image, region) for image in images) / len(images) for images, region in phrases]
    return sum(outside) / len(phrases) if phrases else 0.0


def probabilities(query, key, heads, scale=None, bias=None):
    """softmax(scale·q kᵀ + bias), a matrix (P, N) a head; query (P, heads·d), key (N, heads·d).

    scale: 1/√d unless given. bias: what is added to the scores, one for each head.
    """
    d = query.shape[-1] // heads
    scale = 1 / math.sqrt(d) if scale is None else scale
    result = []
    for head in range(heads):
        own = slice(head * d, (head + 1) * d)
        scores = query[:, own] @ key[:, own].T * scale
        weights = (scores if bias is None else scores + bias[head]).exp()
        result.append(weights / weights.sum(-1, keepdim=True))
    return result


def attended(heads, value):
    """What the heads (P, N) read from value (N, heads·d), side by side."""
    return torch.cat([head @ own for head, own in zip(heads, value.chunk(len(heads), -1))], -1)


def double(model):
    return copy.deepcopy(model).double().requires_grad_(False)


def linear(x, layer):
    x = x @ layer.weight.T
    return x if layer.bias is None else x + layer.bias


def clip_self_attention(encoder, ids):
    """T' (N, N) of one prompt's token ids, from the weights of a CLIP text encoder. Eq. (2)."""
    config, model = encoder.config, double(encoder)
    model = getattr(model, "text_model", model)

    def norm(x, layer):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + config.layer_norm_eps).sqrt()
        return x * layer.weight + layer.bias

    x = model.embeddings.token_embedding.weight[ids] + model.embeddings.position_embedding.weight[: len(ids)]
    later = torch.full((len(ids), len(ids)), -math.inf).triu(1)
    seen = []
    for layer in model.encoder.layers:
        own, y = layer.self_attn, norm(x, layer.layer_norm1)
        query, key, value = linear(y, own.q_proj), linear(y, own.k_proj), linear(y, own.v_proj)
        heads = probabilities(query, key, config.num_attention_heads, bias=[later] * config.num_attention_heads)
        x = x + linear(attended(heads, value), own.out_proj)
        y = linear(norm(x, layer.layer_norm2), layer.mlp.fc1)
        x = x + linear(y / (1 + (-1.702 * y).exp()), layer.mlp.fc2)  # "quick_gelu"
        seen += heads
    return sum(seen) / len(seen)


def bucket(distance, buckets, max_distance):
    """Which of T5's relative positions a key is at, `distance` tokens after the query (Raffel et al., 2020).

    Half of the buckets are for keys ahead, half for the others; of each half, the first half for one distance each, the
    second for logarithmically growing ranges up to max_distance, and whatever is farther.
    """
    half = buckets // 2
    exact, far = half // 2, abs(distance)
    if far >= exact:
        part = math.log(far / exact) / math.log(max_distance / exact)
        far = min(exact + math.floor(part * (half - exact)), half - 1)
    return half + far if distance > 0 else far


def t5_self_attention(encoder, ids, mask):
    """T' (N, N) of one prompt's token ids, from the weights of a T5 encoder; mask (N) is 0 at padding. Eq. (2)."""
    config, model = encoder.config, double(encoder)

    def norm(x, layer):
        return x / (x.square().mean(-1, keepdim=True) + config.layer_norm_epsilon).sqrt() * layer.weight

    positions, blocks = range(len(ids)), model.encoder.block
    buckets, max_distance = config.relative_attention_num_buckets, config.relative_attention_max_distance
    number = torch.tensor([[bucket(key - query, buckets, max_distance) for key in positions] for query in positions])
    padding = torch.tensor([0.0 if own else -math.inf for own in mask.tolist()])
    table = blocks[0].layer[0].SelfAttention.relative_attention_bias.weight  # for all layers
    bias = [table[number, head] + padding for head in range(config.num_heads)]

    x = model.shared.weight[ids]
    seen = []
    for attention, feed in (block.layer for block in blocks):
        own, y = attention.SelfAttention, norm(x, attention.layer_norm)
        heads = probabilities(linear(y, own.q), linear(y, own.k), config.num_heads, 1.0, bias)
        x = x + linear(attended(heads, linear(y, own.v)), own.o)
        own, y = feed.DenseReluDense, norm(x, feed.layer_norm)
        gate = linear(y, own.wi_0)
        gate = gate / 2 * (1 + (math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)).tanh())  # "gelu_new"
        x = x + linear(gate * linear(y, own.wi_1), own.wo)
        seen += heads
    return sum(seen) / len(seen)


@contextmanager
def captured_inputs(model):
    """What every cross-attention layer is given while the context is open: {name: (hidden states, context)}."""
    inputs = {}
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name.endswith("attn2"):

                def hook(module, args, kwargs, name=name):
                    inputs[name] = args[0], kwargs["encoder_hidden_states"]

                hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield inputs


def layers_at(unet, resolution):
    """Names of the cross-attention layers with resolution² queries at the UNet's default size, found by running it."""
    config = unet.config
    sample = torch.zeros(1, config.in_channels, config.sample_size, config.sample_size, dtype=unet.dtype)
    with captured_inputs(unet) as inputs, torch.no_grad():
        unet(sample, 0, torch.zeros(1, 1, config.cross_attention_dim, dtype=unet.dtype))
    return [name for name, (hidden, _) in inputs.items() if hidden.shape[1] == resolution**2]


def layers_of_blocks(first, last):
    """Names of the cross-attention layers of a transformer's blocks, first and last included."""
    return [f"transformer_blocks.{number}.attn2" for number in range(first, last + 1)]


def mean_cross_attention(layers, inputs, mask=None):
    """A (P, N) of the one image in `inputs`: mean over heads, then over the layers {name: module}. Eq. (6).

    mask: (N), the scores of tokens where it is 0 are lowered by 10000.
    """
    maps = []
    for name, layer in layers.items():
        hidden, context = (tensor[0] for tensor in inputs[name])
        bias = None if mask is None else [-10000.0 * (1 - mask)] * layer.heads
        heads = probabilities(linear(hidden, layer.to_q), linear(context, layer.to_k), layer.heads, bias=bias)
        maps.append(sum(heads) / len(heads))
    return sum(maps) / len(maps)


def loss_at(model, model_input, given, names, windows, grid, objective, phrases=(), weight=0.0):
    """The loss of one image (C, h, w) at the input of a float64 UNet or transformer, its maps on the grid (H, W).

    given: what the model is called with beside the input, by name, a batch of one. names: the layers that are read.
    windows: (positions of the content tokens, T) each; their losses are summed. phrases: (positions of its tokens,
    region on the grid) each, whose layout is added with a weight.
    """
    modules = dict(model.named_modules())
    with captured_inputs(model) as inputs:
        model(model_input[None], **given)
    mask = given["encoder_attention_mask"][0] if "encoder_attention_mask" in given else None
    maps = mean_cross_attention({name: modules[name] for name in names}, inputs, mask)

    def images(own):
        return [[[maps[h * grid[1] + w, token] for w in range(grid[1])] for h in range(grid[0])] for token in own]

    total = sum(loss(text, images(own), objective) for own, text in windows) if objective else 0.0
    return total + weight * layout([(images(own), region) for own, region in phrases])


def update(model, latents, scale, alpha, *where):
    """z' = (c·z - α ∇ loss)/c of one image, the gradient taken at c·z, and the loss before. Eq. (15)."""
    model_input = (scale * latents).requires_grad_()
    value = loss_at(model, model_input, *where)
    (gradient,) = torch.autograd.grad(value, model_input)
    return ((model_input - alpha * gradient) / scale).detach(), value.item()


# ----------------------------------------------------------------------------------------------------------------------
# The contrast objective, which is no paper's


RELATED, PLACE = 0.5, 0.25  # λ and μ


def lift(attention, own):
    """A_ij / mean_{k>j} A_kj with A_ij = T'_ij / Σ_{k<=i} T'_ik over content tokens, row i of its columns j < i."""
    rows = [[attention[i][j] for j in own if j <= i] for i in own]
    shares, matrix = [parts(row) if sum(row) > 0 else row for row in rows], []
    for i in range(len(shares)):
        later = [[shares[k][j] for k in range(j + 1, len(shares))] for j in range(i)]
        matrix.append([shares[i][j] * len(seen) / sum(seen) if sum(seen) > 0 else 0.0 for j, seen in enumerate(later)])
    return matrix


def relation(attention, own):
    """R_ij = lift_ij / max_{k<i} lift_ik, row i of its columns j < i."""
    rows = lift(attention, own)
    return [[value / max(row) if max(row) > 0 else 0.0 for value in row] for row in rows]


def weight(image):
    """w = (1 - mean/max)² of one smoothed map, a number that no gradient passes."""
    values = [float(value) for row in smooth(image) for value in row]
    return (1 - sum(values) / len(values) / max(values)) ** 2 if max(values) > 0 else 0.0


def spread(image):
    """v = 6 (Var x + Var y) of one map less its minimum, x and y from 0 to 1 across the picture."""
    height, width = len(image), len(image[0])
    least = min(value for row in image for value in row)
    total = sum(value - least for row in image for value in row)
    if not total > 0:
        return 0.0
    places = [((h + 0.5) / height, (w + 0.5) / width) for h in range(height) for w in range(width)]
    parts = [(value - least) / total for row in image for value in row]
    y_mean, x_mean = (sum(q * place[axis] for q, place in zip(parts, places)) for axis in (0, 1))
    return 6 * sum(q * ((y - y_mean) ** 2 + (x - x_mean) ** 2) for q, (y, x) in zip(parts, places))


def weighted_mean(values, weights):
    """Σ w v / Σ w; 0 where no weight is left."""
    total = sum(weights)
    return sum(own * value for value, own in zip(values, weights)) / total if total > 0 else 0.0


def contrast(related, images, objective="contrast", weights=None):
    """How much unrelated words share a place + λ how far related ones are apart + μ how many places a word has, which
    "relation" leaves out.

    related: R. images: the content tokens' maps. weights: each map's w; their own unless given.
    """
    weights = [weight(image) for image in images] if weights is None else weights
    similar, pairs = similarity(images), [(i, j) for i in range(len(images)) for j in range(i)]
    both = [weights[i] * weights[j] for i, j in pairs]
    unrelated = [w * (1 - related[i][j]) for w, (i, j) in zip(both, pairs)]
    shared = weighted_mean([similar[i][j] for i, j in pairs], unrelated)
    parted = weighted_mean([1 - similar[i][j] for i, j in pairs], [w * related[i][j] for w, (i, j) in zip(both, pairs)])
    if objective == "relation" or len(images) < 2:  # one word alone is left as it is
        return shared + RELATED * parted
    return shared + RELATED * parted + PLACE * weighted_mean([spread(smooth(image)) for image in images], weights)
