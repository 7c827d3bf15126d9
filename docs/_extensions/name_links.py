"""Names in code font become links: our own to their documentation, those of others to theirs.

So the pages can say `optax_sam.sam` or `optax.chain` as anywhere else, and read well where no site
is built. The other projects publish inventories of their pages, but a build must not need the
internet; the few names that our pages and signatures mention are listed here, and the workflow that
publishes the site checks every address.
"""

import re

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

import optax_sam

JAX = "https://docs.jax.dev/en/latest/_autosummary/"
OPTAX = "https://optax.readthedocs.io/en/latest/api/"
FLAX = "https://flax.readthedocs.io/en/latest/api_reference/"
LINEN = "https://flax-linen.readthedocs.io/en/latest/api_reference/"

# The page of a name, where {} is the name itself, and the names.
PAGES = {
    JAX
    + "{}.html": """jax.Array jax.eval_shape jax.grad jax.jit jax.lax.cond jax.lax.map jax.lax.scan
        jax.pmap jax.shard_map jax.tree_util.Partial jax.value_and_grad jax.vmap""",
    OPTAX + "transformations.html#{}": """optax.EmptyState optax.GradientTransformation
        optax.GradientTransformationExtraArgs optax.OptState optax.Params optax.Updates
        optax.add_decayed_weights optax.clip_by_global_norm optax.conditionally_mask
        optax.conditionally_transform optax.set_to_zero optax.with_extra_args_support""",
    OPTAX + "optimizer_wrappers.html#{}": """optax.MultiSteps optax.apply_if_finite optax.flatten
        optax.lookahead optax.masked""",
    OPTAX + "combining_optimizers.html": "optax.chain optax.named_chain optax.partition",
    OPTAX + "optimizer_schedules.html": "optax.inject_hyperparams",
    FLAX + "flax.nnx/module.html": "nnx.Module",
    FLAX + "flax.nnx/training/optimizer.html": "nnx.Optimizer",
    LINEN + "flax.linen/module.html": "nn.Module",
    "https://numpy.org/doc/stable/reference/generated/numpy.ndarray.html": "np.ndarray",
}
ADDRESSES = {name: page.format(name) for page, names in PAGES.items() for name in names.split()}


def own_name(text: str) -> str | None:
    """The full name of what a piece of code names or calls, if that is one of our public names."""
    name = text.partition("(")[0] if text.endswith(")") else text
    if re.fullmatch(r"optax_sam(\.\w+)+", name):
        return name  # if there is no such name, the build says so
    return f"optax_sam.{name}" if name in optax_sam.__all__ else None


class LinkNames(SphinxPostTransform):
    """Wraps code that is a known name, and nothing else, into a link."""

    default_priority = 5  # before the references are resolved

    def run(self, **kwargs: object) -> None:
        """Looks at all inline code that is in no link and no heading yet."""
        for code in list(self.document.findall(nodes.literal)):
            parents = (nodes.reference, pending_xref, nodes.title)
            if isinstance(code.parent, parents):
                continue
            text = code.astext()
            if address := ADDRESSES.get(text.removesuffix("()")):
                link: nodes.Element = nodes.reference("", "", refuri=address, internal=False)
            elif name := own_name(text):
                attributes = {"refdomain": "py", "reftype": "obj", "reftarget": name}
                link = pending_xref(
                    "", refdoc=self.env.current_document.docname, refwarn=False, **attributes
                )
            else:
                continue
            code.replace_self(link)
            link += code


def resolve(app, env, node, contnode):
    """Sends a type in a signature to its page, and one of ours to where it is public."""
    target = node.get("reftarget", "")
    if address := ADDRESSES.get(target):
        return nodes.reference("", "", contnode, refuri=address, internal=False)
    name = target.rpartition(".")[2]
    if not (target.startswith("optax_sam.") and name in optax_sam.__all__):
        return None
    return env.get_domain("py").resolve_xref(
        env, node["refdoc"], app.builder, "obj", f"optax_sam.{name}", node, contnode
    )


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the transformation and the event."""
    app.add_post_transform(LinkNames)
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
