//! From what a request asks for to something that matchers are made of.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use llguidance::ParserFactory;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::InferenceCapabilities;
use serde_json::{Map, Value, json};

use crate::bounds::{Bounds, GrammarError};
use crate::cache::Cache;
use crate::matcher::{Matcher, reason};
use crate::pool::Pool;
use crate::spec::GrammarSpec;
use crate::vocabulary::{Vocabulary, VocabularyError};

/// What holds of all JSON: one space at most behind a comma or a colon and none elsewhere, so that no
/// model writes blanks for ever; and one of several schemas is any of them, where it cannot be known
/// that they exclude each other.
const JSON_OPTIONS: [(&str, &str); 4] = [
    ("item_separator", "\", ?\""),
    ("key_separator", "\": ?\""),
    ("whitespace_flexible", "false"),
    ("coerce_one_of", "true"),
];

/// The key of a schema that these options are told by.
const OPTIONS_KEY: &str = "x-guidance";

/// A grammar that is in order.
pub struct Compiled {
    /// One that has seen no token, for others to be cloned from.
    fresh: Mutex<Matcher>,
    spoilt: Arc<AtomicBool>,
}

/// Compiles grammars on threads of its own, and keeps those that were used last.
#[derive(Debug)]
pub struct Compiler {
    shared: Arc<Shared>,
    pool: Pool,
}

type MakeVocabulary = Box<dyn Fn() -> Result<Vocabulary, VocabularyError> + Send + Sync>;

struct Shared {
    bounds: Bounds,
    make: MakeVocabulary,
    /// Made by the first grammar.
    ready: OnceLock<Result<Ready, GrammarError>>,
    cache: Mutex<Cache>,
}

struct Ready {
    vocabulary: Vocabulary,
    factory: ParserFactory,
}

// === impl Compiled ===

impl Compiled {
    /// A matcher at the beginning of a text.
    pub fn matcher(&self) -> Matcher {
        let fresh = self.fresh.lock().unwrap_or_else(PoisonError::into_inner);
        fresh.clone()
    }

    pub(crate) fn is_spoilt(&self) -> bool {
        self.spoilt.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for Compiled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compiled")
            .field("spoilt", &self.is_spoilt())
            .finish_non_exhaustive()
    }
}

// === impl Compiler ===

impl Compiler {
    /// Starts `threads` threads. `vocabulary` is called by one of them, for the first grammar.
    pub fn new(
        bounds: Bounds,
        threads: usize,
        vocabulary: impl Fn() -> Result<Vocabulary, VocabularyError> + Send + Sync + 'static,
    ) -> Self {
        Self {
            pool: Pool::new("grammar", threads, bounds.queue_max),
            shared: Arc::new(Shared {
                cache: Mutex::new(Cache::new(bounds.cached_max)),
                bounds,
                make: Box::new(vocabulary),
                ready: OnceLock::new(),
            }),
        }
    }

    /// What is refused.
    pub fn bounds(&self) -> &Bounds {
        &self.shared.bounds
    }

    /// Whether the vocabulary is in order: the first grammar waits for that.
    pub fn is_ready(&self) -> bool {
        self.shared.ready.get().is_some()
    }

    /// Compiles a grammar, or finds it. `done` is called once with the outcome: at once where it is
    /// known, else on a thread of this compiler. It must not block. Should the pool end or the
    /// compiler be stuck, it is dropped, or called late: whoever waits sets a limit.
    pub fn compile(
        &self,
        spec: GrammarSpec,
        done: impl FnOnce(Result<Arc<Compiled>, GrammarError>) + Send + 'static,
    ) -> Result<(), GrammarError> {
        let (kind, text) = spec.key();
        self.shared.bounds.check(&spec, &text)?;
        let key = format!("{kind} {text}");
        if let Some(compiled) = self.shared.cache().get(&key) {
            done(Ok(compiled));
            return Ok(());
        }
        let shared = Arc::clone(&self.shared);
        let queue_max = self.shared.bounds.queue_max;
        self.pool
            .submit(move || done(shared.find_or_compile(&key, spec)))
            .map_err(|waiting| GrammarError::QueueFull { waiting, queue_max })
    }
}

// === impl Shared ===

impl Shared {
    fn cache(&self) -> MutexGuard<'_, Cache> {
        // No code of others runs with the lock held.
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Others may have compiled the same while this one waited.
    fn find_or_compile(&self, key: &str, spec: GrammarSpec) -> Result<Arc<Compiled>, GrammarError> {
        if let Some(compiled) = self.cache().get(key) {
            return Ok(compiled);
        }
        let ready = self.ready.get_or_init(|| self.prepare());
        let ready = ready.as_ref().map_err(Clone::clone)?;
        let compiled = catch_unwind(AssertUnwindSafe(|| ready.compile(spec)));
        let compiled = Arc::new(compiled.unwrap_or(Err(GrammarError::Failed))?);
        self.cache().put(key, &compiled);
        Ok(compiled)
    }

    fn prepare(&self) -> Result<Ready, GrammarError> {
        let model = |error: &dyn fmt::Display| GrammarError::Model(error.to_string());
        let vocabulary = (self.make)().map_err(|error| model(&error))?;
        let slices = SlicedBiasComputer::general_slices();
        let capabilities = InferenceCapabilities::default();
        let factory = ParserFactory::new(&vocabulary.env, capabilities, &slices);
        let mut factory = factory.map_err(|error| model(&error))?;
        factory.quiet();
        *factory.limits_mut() = self.bounds.limits();
        Ok(Ready {
            vocabulary,
            factory,
        })
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("bounds", &self.bounds)
            .finish_non_exhaustive()
    }
}

// === impl Ready ===

impl Ready {
    /// Everything up to the first mask, so that a grammar that allows nothing is refused here.
    fn compile(&self, spec: GrammarSpec) -> Result<Compiled, GrammarError> {
        let refused = |message: &str| GrammarError::Refused(reason(message));
        let parser = self.factory.create_parser(top_level(spec)?);
        let parser = parser.map_err(|error| match error.to_string() {
            panic if panic.starts_with("panic:") => GrammarError::Failed,
            other => refused(&other),
        })?;
        let inner = llguidance::Matcher::new(Ok(parser));
        let spoilt = Arc::new(AtomicBool::new(false));
        let fresh = Matcher::new(inner, self.vocabulary.clone(), Arc::clone(&spoilt));
        let fresh = fresh.map_err(|error| refused(&error.0))?;
        Ok(Compiled {
            fresh: Mutex::new(fresh),
            spoilt,
        })
    }
}

// === impl Bounds ===

impl Bounds {
    fn limits(&self) -> ParserLimits {
        ParserLimits {
            initial_lexer_fuel: self.lexer_fuel_max,
            max_grammar_size: self.symbols_max,
            max_lexer_states: self.lexer_states_max,
            step_lexer_fuel: self.mask_fuel_max,
            step_max_items: self.mask_items_max,
            verbose_errors: false,
            ..ParserLimits::default()
        }
    }
}

// === free functions ===

fn top_level(spec: GrammarSpec) -> Result<TopLevelGrammar, GrammarError> {
    Ok(match spec {
        GrammarSpec::JsonSchema(Value::Object(schema)) => {
            TopLevelGrammar::from_json_schema(with_options(schema))
        }
        GrammarSpec::JsonSchema(other) => {
            let kind = kind(&other);
            let message = format!("a JSON schema must be an object, not {kind}");
            return Err(GrammarError::Refused(message));
        }
        GrammarSpec::AnyJsonObject => {
            let mut any = Map::new();
            any.insert("type".to_owned(), json!("object"));
            TopLevelGrammar::from_json_schema(with_options(any))
        }
        GrammarSpec::Regex(pattern) => TopLevelGrammar::from_regex(&pattern),
        GrammarSpec::Lark(text) => TopLevelGrammar::from_lark(text),
    })
}

/// The schema with our options, unless it has its own.
fn with_options(mut schema: Map<String, Value>) -> Value {
    let options = schema.entry(OPTIONS_KEY).or_insert_with(|| json!({}));
    if let Value::Object(options) = options {
        for (name, text) in JSON_OPTIONS {
            let value = serde_json::from_str(text).expect("the options are JSON");
            options.entry(name).or_insert(value);
        }
    }
    Value::Object(schema)
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
