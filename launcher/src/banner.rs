//! What a person sees when the server is ready.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use headrace_config::Serve;

/// What the router said when it was ready.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ready {
    pub(crate) model: Option<String>,
    pub(crate) device: Option<String>,
    pub(crate) dtype: Option<String>,
}

/// The address to type: that of this machine when the server listens on all of them.
pub(crate) fn url(serve: &Serve, port: u16) -> String {
    let ip = match serve.http.hostname.parse::<IpAddr>() {
        Ok(IpAddr::V4(ip)) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        Ok(IpAddr::V6(ip)) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        Ok(ip) => ip,
        Err(_) => Ipv4Addr::LOCALHOST.into(),
    };
    format!("http://{}", SocketAddr::new(ip, port))
}

/// A block of lines with a command to paste.
pub(crate) fn banner(serve: &Serve, url: &str, ready: &Ready) -> String {
    let model = ready.model.as_deref().unwrap_or(&serve.model.id);
    let device = ready.device.as_deref().unwrap_or(&serve.device.kind);
    let dtype = ready.dtype.as_deref().unwrap_or(&serve.device.dtype);
    let shards = match serve.shards.len() {
        1 => String::new(),
        n => format!(", {n} shards"),
    };
    let curl = curl(serve, url);
    format!(
        "\n  {model} is ready at {url}\n  {device}, {dtype}{shards}\n\n  \
         Try it in a browser, at that address, or here:\n\n{curl}\n\n  \
         Ctrl-C stops the server.\n\n"
    )
}

/// A chat if the model has a template for it, plain continuation if not.
fn curl(serve: &Serve, url: &str) -> String {
    let key = match serve.http.api_key {
        Some(_) => " \\\n    -H \"Authorization: Bearer $API_KEY\"",
        None => "",
    };
    let (route, body) = if has_chat_template(serve) {
        let body = r#"{"model": "tgi", "messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 64, "stream": true}"#;
        ("/v1/chat/completions", body)
    } else {
        let body = r#"{"inputs": "The sky is blue because", "parameters": {"max_new_tokens": 64}}"#;
        ("/generate_stream", body)
    };
    format!(
        "curl -N {url}{route} \\\n    -H 'Content-Type: application/json'{key} \\\n    -d '{body}'"
    )
}

fn has_chat_template(serve: &Serve) -> bool {
    let folder = &serve.model.path;
    let config = serve.model.tokenizer_config_path.clone();
    let config = config.unwrap_or_else(|| folder.join("tokenizer_config.json"));
    let in_config = std::fs::read_to_string(config)
        .ok()
        .and_then(|text| serde_json::from_str::<serde_json::Value>(&text).ok())
        .is_some_and(|config| config.get("chat_template").is_some_and(|t| !t.is_null()));
    in_config
        || ["chat_template.jinja", "chat_template.json"]
            .iter()
            .any(|name| folder.join(name).is_file())
}
