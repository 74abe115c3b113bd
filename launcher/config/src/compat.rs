//! TGI's flags that do nothing here: those that are harmless are taken, with a line in the log if
//! somebody set them; those that would change answers are refused with what is missing.

use std::path::PathBuf;

use clap::Args;
use clap::builder::BoolishValueParser;

use crate::resolve::ConfigError;

/// Hidden from the list of flags; the help page names them in one paragraph.
#[derive(Debug, Clone, PartialEq, Args)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a switch of TGI's command line"
)]
pub struct CompatArgs {
    /// Not supported yet: adapters
    #[arg(long, hide = true, env = "LORA_ADAPTERS", value_name = "LIST")]
    pub lora_adapters: Option<String>,
    /// Not supported yet: a flat folder with the weight files (give it as --model-id)
    #[arg(long, hide = true, env = "WEIGHTS_CACHE_OVERRIDE", value_name = "DIR")]
    pub weights_cache_override: Option<PathBuf>,
    /// Not supported yet: a rope scaling other than the model's own
    #[arg(long, hide = true, env = "ROPE_SCALING", value_name = "KIND")]
    pub rope_scaling: Option<String>,
    /// Not supported yet: a rope scaling other than the model's own
    #[arg(long, hide = true, env = "ROPE_FACTOR", value_name = "FACTOR")]
    pub rope_factor: Option<f32>,
    /// Not supported: a tunnel
    #[arg(long, hide = true, env = "NGROK")]
    pub ngrok: bool,
    /// Without effect: no tunnel
    #[arg(long, hide = true, env = "NGROK_AUTHTOKEN", value_name = "TOKEN")]
    pub ngrok_authtoken: Option<String>,
    /// Without effect: no tunnel
    #[arg(long, hide = true, env = "NGROK_EDGE", value_name = "EDGE")]
    pub ngrok_edge: Option<String>,
    /// Without effect: no code of a model's repository is ever executed
    #[arg(long, hide = true, env = "TRUST_REMOTE_CODE")]
    pub trust_remote_code: bool,
    /// Without effect yet: speculation changes speed, not answers
    #[arg(long, hide = true, env = "SPECULATE", value_name = "N")]
    pub speculate: Option<usize>,
    /// Without effect: prompts are cut into chunks and join running ones in every step
    #[arg(long, hide = true, env = "WAITING_SERVED_RATIO", value_name = "RATIO")]
    pub waiting_served_ratio: Option<f32>,
    /// Without effect: prompts are cut into chunks and join running ones in every step
    #[arg(long, hide = true, env = "MAX_WAITING_TOKENS", value_name = "N")]
    pub max_waiting_tokens: Option<usize>,
    /// Without effect: the size of the KV cache is measured; --kv-memory bounds it
    #[arg(long, hide = true, env = "MAX_BATCH_TOTAL_TOKENS", value_name = "N")]
    pub max_batch_total_tokens: Option<u32>,
    /// 0 turns CUDA graphs off; other sizes are without effect: there is a graph for each up to 512
    #[arg(
        long,
        hide = true,
        env = "CUDA_GRAPHS",
        value_name = "LIST",
        value_delimiter = ','
    )]
    pub cuda_graphs: Vec<usize>,
    /// Without effect: see --reference-ops
    #[arg(long, hide = true, env = "DISABLE_CUSTOM_KERNELS")]
    pub disable_custom_kernels: bool,
    /// Without effect: log-probabilities of a prompt are computed when a request asks for them
    #[arg(long, hide = true, env = "ENABLE_PREFILL_LOGPROBS")]
    pub enable_prefill_logprobs: bool,
    /// Without effect: nothing is ever reported to anybody
    #[arg(long, hide = true, env = "USAGE_STATS", value_name = "on|off|no-stack")]
    pub usage_stats: Option<String>,
    /// Without effect: prompts are always cut into chunks
    #[arg(long, hide = true, env = "PREFILL_CHUNKING", value_name = "BOOL", value_parser = BoolishValueParser::new())]
    pub prefill_chunking: Option<bool>,
    /// Without effect: the attention backend is chosen by device and model
    #[arg(long, hide = true, env = "ATTENTION", value_name = "NAME")]
    pub attention: Option<String>,
    /// Those of `IGNORED_VARIABLES` that are set.
    #[arg(skip)]
    pub(crate) ignored: Vec<(&'static str, &'static str)>,
}

/// Variables of TGI's shards that somebody may have set for an effect, and what is here instead.
pub(crate) const IGNORED_VARIABLES: [(&str, &str); 13] = [
    (
        "TGI_WIGGLE_ROOM",
        "--cuda-memory-fraction bounds the GPU's memory",
    ),
    ("USE_FLASH_ATTENTION", CHOSEN),
    ("ROCM_USE_FLASH_ATTN_V2_TRITON", NO_ROCM),
    ("ROCM_USE_CUSTOM_PAGED_ATTN", NO_ROCM),
    ("ROCM_USE_SKINNY_GEMM", NO_ROCM),
    ("PYTORCH_TUNABLEOP_ENABLED", NO_ROCM),
    ("XPU_MEMORY_FRACTION", "there is no path for Intel's GPUs"),
    ("EXLLAMA_VERSION", KERNELS),
    ("DISABLE_EXLLAMA", KERNELS),
    ("USE_CUTLASS_W8A8", KERNELS),
    ("MAX_IMAGE_FETCH_SIZE", "no images yet"),
    ("LOG_COLORIZE", "logs are coloured on terminals only"),
    ("LOG_FORMAT", "--json-output is the other format"),
];
const CHOSEN: &str = "the attention backend is chosen by device and model";
const NO_ROCM: &str = "there is no path for AMD's GPUs";
const KERNELS: &str = "the kernels of quantized weights are chosen by device and format";

// === impl CompatArgs ===

impl CompatArgs {
    /// Refuses what would change answers.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        let refused = [
            (
                "--lora-adapters",
                self.lora_adapters.is_some(),
                "LoRA adapters are",
            ),
            (
                "--weights-cache-override",
                self.weights_cache_override.is_some(),
                "a folder of weight files apart from the model's is",
            ),
            (
                "--rope-scaling",
                self.rope_scaling.is_some(),
                "a rope scaling other than the model's own is",
            ),
            (
                "--rope-factor",
                self.rope_factor.is_some(),
                "a rope scaling other than the model's own is",
            ),
            (
                "--speculate",
                self.speculate.is_some_and(|n| n > 0),
                "speculation, by n-grams or by a Medusa head, is",
            ),
            ("--ngrok", self.ngrok, "a tunnel to the internet is"),
        ];
        for (flag, is_set, what) in refused {
            if is_set {
                return Err(ConfigError::Unsupported { flag, what });
            }
        }
        Ok(())
    }

    /// Whether steps are recorded as graphs, where a device can.
    pub(crate) fn records_graphs(&self) -> bool {
        !self.cuda_graphs.contains(&0)
    }

    /// One sentence for each flag that somebody set to no effect.
    pub(crate) fn warnings(&self) -> Vec<String> {
        let chunks = "prompts are cut into chunks and join running ones in every step";
        let ignored = [
            (
                "--waiting-served-ratio",
                self.waiting_served_ratio.is_some(),
                chunks,
            ),
            (
                "--max-waiting-tokens",
                self.max_waiting_tokens.is_some(),
                chunks,
            ),
            (
                "--max-batch-total-tokens",
                self.max_batch_total_tokens.is_some(),
                "the KV cache is as large as memory allows; --kv-memory bounds it",
            ),
            (
                "--disable-custom-kernels",
                self.disable_custom_kernels,
                "see --reference-ops",
            ),
            (
                "PREFILL_CHUNKING",
                self.prefill_chunking == Some(false),
                "prompts are always cut into chunks",
            ),
            ("ATTENTION", self.attention.is_some(), CHOSEN),
        ];
        ignored
            .into_iter()
            .filter(|(_, is_set, _)| *is_set)
            .map(|(flag, _, why)| (flag, why))
            .chain(self.ignored.iter().copied())
            .map(|(what, why)| format!("{what} is without effect: {why}"))
            .collect()
    }
}
