//! What can be wrong with bytes from the other side.

/// Bytes that are no valid message. Always a fault of the sender.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum WireError {
    /// Not protobuf, or not this message.
    #[error("not a protobuf message of this type: {0}")]
    Protobuf(#[from] prost::DecodeError),
    /// A `ToShard` that carries no plan.
    #[error("the message carries no plan")]
    NoPlan,
    /// A column that does not divide into its elements.
    #[error("column {column} has {bytes} bytes, not a multiple of {element}")]
    Ragged {
        /// The field.
        column: &'static str,
        /// Its length.
        bytes: usize,
        /// Bytes of one element.
        element: usize,
    },
    /// A column whose length contradicts another one.
    #[error("column {column} has {entries} entries, {expected} were announced")]
    Entries {
        /// The field.
        column: &'static str,
        /// Its length.
        entries: usize,
        /// What the other columns say.
        expected: usize,
    },
    /// A count below zero.
    #[error("column {column} holds the negative count {count}")]
    NegativeCount {
        /// The field.
        column: &'static str,
        /// The count.
        count: i32,
    },
    /// Rows that are not ascending.
    #[error("column {column} is not ascending")]
    NotAscending {
        /// The field.
        column: &'static str,
    },
    /// A binding without its sampling parameters.
    #[error("the binding of slot {slot} has no sampling")]
    NoSampling {
        /// The slot.
        slot: u32,
    },
}
